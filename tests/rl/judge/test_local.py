"""A judge through our own model and sampler, with a tiny random checkpoint: it answers nonsense,
which must not become a score.
"""

import jax
import numpy as np
import pytest

from mmrecoder_jax.config import load
from mmrecoder_jax.data import synthetic
from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.models import weights
from mmrecoder_jax.models.config import preset
from mmrecoder_jax.models.processor import IM_START, VISION_START, Processor
from mmrecoder_jax.models.qwen2_5_vl import init_params
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.models.tokenizer import load_tokenizer, train_sentencepiece
from mmrecoder_jax.rl.judge import local
from mmrecoder_jax.rl.judge.answers import PROMPT_AFTER
from mmrecoder_jax.rl.judge.base import JudgeDown
from mmrecoder_jax.rl.judge.differences import DIFFERENCES
from mmrecoder_jax.rl.judge.local import question
from mmrecoder_jax.rl.judge.make import make_judge
from mmrecoder_jax.rl.sampler import Response
from tests.rl.judge.server import GOOD

PIXELS = np.random.default_rng(0).integers(0, 256, (112, 168, 3), np.uint8)
TARGET = png_bytes(PIXELS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A published directory of a random tiny model with its tokenizer."""
    path = tmp_path_factory.mktemp("judge")
    tokenizer = train_sentencepiece(
        synthetic.tokenizer_texts(200, seed=0), preset("tiny").vocab_size, synthetic.words()
    )
    params = init_params(preset("tiny"), jax.random.key(0))
    ids = {"image_token_id": tokenizer.image_pad_id}
    weights.save_pretrained(path, params, preset("tiny"), "float32", ids)
    tokenizer.save(path)
    return str(path)


@pytest.fixture
def judge(directory, tmp_path):
    with local_judge(directory, tmp_path) as judge:
        yield judge


def local_judge(directory, tmp_path, windows=(6, 12), system="You judge.", **changes):
    config = load("stage1", "smoke")
    config.reward.judge = "local"
    config.data.windows, config.processor.system = windows, system
    config.judge.update(
        {"path": directory, "batch_size": 2, "prompt_length": 1024, "max_tokens": 8, **changes}
    )
    return make_judge(config, str(tmp_path), make_mesh())


def written(ids, finished=True):
    """A response of these ids."""
    return Response(ids, np.zeros(len(ids), np.float32), finished, np.zeros(len(ids), np.float32))


def render(i):
    return np.full((112, 168, 3), 25 * i, np.uint8)


def test_nonsense_is_unscorable_and_batches_are_one_program(judge):
    futures = [judge.submit(TARGET, render(i)) for i in range(3)]
    assert not any(future.done() for future in futures)
    judge.finish()
    assert all(
        future.result().score is None and "unreadable answer" in future.result().problem
        for future in futures
    )
    programs = judge.sampler.compilations()
    judge.submit(TARGET, render(3))
    judge.finish()
    assert judge.sampler.compilations() == programs
    assert judge.stats()["unscorable"] == 4


def test_a_question_holds_both_pictures_in_order(directory):
    tokenizer = load_tokenizer(directory)
    system = "You are a helpful assistant."
    processor = Processor(tokenizer, preset("tiny").vision, 28 * 28, 168 * 112, system)
    segment = question(processor, tokenizer, TARGET, render(1))
    text = tokenizer.decode(segment.ids.tolist(), skip_special=False)
    assert [image.grid for image in segment.images] == [(4, 6), (4, 6)]
    assert (segment.ids == tokenizer.image_pad_id).sum() == 48
    assert text.count(VISION_START) == 2 and text.count(IM_START) == 3
    assert PROMPT_AFTER[:40] in text
    for image, pixels in zip(segment.images, (PIXELS, render(1)), strict=True):
        np.testing.assert_array_equal(image.patches, processor.image(pixels).patches)


def test_an_answer_that_can_be_read_is_a_score_and_is_not_asked_again(
    judge, directory, monkeypatch
):
    assert judge.sampler.spec.response_length == 8  # judge.max_tokens
    answer = np.asarray(load_tokenizer(directory).encode(GOOD), np.int32)

    def answers(params, prompts, uids, key):
        assert len(uids) == 2  # judge.batch_size
        return [written(answer) for _ in uids]

    monkeypatch.setattr(judge.sampler, "answer", answers)
    future = judge.submit(TARGET, render(0))
    judge.finish()
    assert future.result().score == pytest.approx(0.8)
    assert judge.submit(TARGET, render(0)).done()


def test_a_small_model_may_be_asked_for_differences(directory, tmp_path, monkeypatch):
    """The same model, sampler and failures; another question, another way to read its answer."""
    listed = '{"errors": [{"category": "style_error", "severity": 3, "location": "all bars"}]}'
    answer = np.asarray(load_tokenizer(directory).encode(listed), np.int32)
    with local_judge(directory, tmp_path, question="differences", max_failures=9) as judge:
        assert judge.name == "local differences"
        nonsense = judge.submit(TARGET, render(0))
        judge.finish()
        assert nonsense.result().score is None
        texts = []

        def answers(params, prompts, uids, key):
            return [written(answer) for _ in uids]

        def asked(processor, tokenizer, *args):
            segment = question(processor, tokenizer, *args)
            texts.append(tokenizer.decode(segment.ids.tolist(), skip_special=False))
            return segment

        monkeypatch.setattr(judge.sampler, "answer", answers)
        monkeypatch.setattr(local, "question", asked)
        future = judge.submit(TARGET, render(0))
        judge.finish()
    assert future.result().score == pytest.approx(0.94)
    assert future.result().points["style"] == 3
    assert DIFFERENCES.before in texts[0] and DIFFERENCES.after in texts[0]
    with local_judge(directory, tmp_path) as graded:  # the same pair and model, another question
        assert not graded.submit(TARGET, render(0)).done()
        graded.finish()


def test_an_answer_that_its_limit_cut_is_no_answer(judge, directory, monkeypatch):
    """All that is there can be read; "10" may have been meant where it ends with "1"."""
    answer = np.asarray(load_tokenizer(directory).encode(GOOD), np.int32)
    cut = written(answer, finished=False)
    monkeypatch.setattr(
        judge.sampler, "answer", lambda params, prompts, uids, key: [cut] * len(uids)
    )
    future = judge.submit(TARGET, render(0))
    judge.finish()
    assert future.result().score is None
    assert "cut at judge.max_tokens=8" in future.result().problem


def test_a_question_too_long_for_its_bucket(directory, tmp_path):
    with local_judge(directory, tmp_path, prompt_length=64, max_failures=1) as judge:
        future = judge.submit(TARGET, render(0))
        judge.finish()
        with pytest.raises(JudgeDown, match=r"exceeds judge.prompt_length=64"):
            future.result()


def test_a_render_that_no_bucket_holds_ends_nothing(directory, tmp_path):
    """A strip has 12 windows where 6 are the most, and a large render makes a question too long;
    neither speaks against the judge, whatever the policy draws.
    """
    strip = np.zeros((28, 672, 3), np.uint8)
    with local_judge(directory, tmp_path, max_failures=1, windows=(6,)) as judge:
        asked = [judge.submit(TARGET, pixels) for pixels in (strip, render(1))]
        judge.finish()
        found = [future.result() if i == 0 else future for i, future in enumerate(asked)]
    assert found[0].score is None
    assert "an image of 12 windows exceeds the largest of data.windows=(6,)" in found[0].problem
    length = len(
        question(
            Processor(load_tokenizer(directory), preset("tiny").vision, 784, 168 * 112, "Grade."),
            load_tokenizer(directory),
            png_bytes(np.zeros((56, 56, 3), np.uint8)),
            np.zeros((56, 56, 3), np.uint8),
        ).ids
    )
    small = png_bytes(np.zeros((56, 56, 3), np.uint8))
    with local_judge(
        directory, tmp_path / "b", max_failures=1, prompt_length=length + 9, system="Grade."
    ) as judge:
        future = judge.submit(small, render(2))
        judge.finish()
        assert "exceeds judge.prompt_length" in future.result().problem


def test_a_target_that_is_no_image_ends_nothing(directory, tmp_path):
    with local_judge(directory, tmp_path, max_failures=1) as judge:
        future = judge.submit(b"<html>", render(0))
        judge.finish()
        assert future.result().score is None and "cannot be read" in future.result().problem
