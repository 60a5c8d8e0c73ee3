"""A judge through our own model and sampler, with a tiny random checkpoint: it answers nonsense,
which must not become a score.
"""

import numpy as np
import pytest

from mmrecoder_jax import grpo
from mmrecoder_jax.models import weights
from mmrecoder_jax.models.processor import IM_START, VISION_START
from mmrecoder_jax.rl.judge.base import PROMPT_AFTER, JudgeDown, VerdictCache
from mmrecoder_jax.rl.judge.http import HttpJudge
from mmrecoder_jax.runtime import ConfigError
from tests.rl.judge.server import GOOD


@pytest.fixture(scope="module")
def directory(policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    weights.save_pretrained(
        path,
        policy.params,
        policy.runtime.model.config,
        "float32",
        {"image_token_id": policy.runtime.tokenizer.image_pad_id},
    )
    policy.runtime.tokenizer.save(path)
    return str(path)


@pytest.fixture
def runtime(policy, tmp_path, monkeypatch):
    """The policy's runtime with a configuration and a work directory of its own."""
    import dataclasses

    return dataclasses.replace(
        policy.runtime,
        config=policy.runtime.config.copy_and_resolve_references(),
        workdir=str(tmp_path),
    )


def settings(runtime, back_end, **judge):
    runtime.config.reward.judge = back_end
    runtime.config.judge.update(judge)
    return runtime


def pictures(policy, count):
    return [
        (chart.image, np.full((112, 168, 3), 25 * i, np.uint8))
        for i, chart in enumerate(policy.charts[:count])
    ]


def test_nonsense_is_unscorable_and_batches_are_one_program(policy, runtime, directory):
    settings(runtime, "local", path=directory, batch_size=2, prompt_length=1024, max_tokens=8)
    with runtime.judge() as judge:
        futures = [judge.submit(*pair) for pair in pictures(policy, 3)]
        assert not any(future.done() for future in futures)
        judge.finish()
        assert all(
            future.result().score is None and "unreadable answer" in future.result().problem
            for future in futures
        )
        programs = judge.sampler.compilations()
        judge.submit(*pictures(policy, 4)[3])
        judge.finish()
        assert judge.sampler.compilations() == programs
        assert judge.stats()["unscorable"] == 4


def test_a_question_holds_both_pictures_in_order(policy, runtime, directory):
    settings(runtime, "local", path=directory, batch_size=2, prompt_length=1024, max_tokens=8)
    with runtime.judge() as judge:
        ((target, render),) = pictures(policy, 1)
        segment = judge._question(target, render)
        text = runtime.tokenizer.decode(segment.ids.tolist(), skip_special=False)
        assert [image.grid for image in segment.images] == [(4, 6), (4, 6)]
        assert (segment.ids == runtime.tokenizer.image_pad_id).sum() == 48
        assert (
            text.count(VISION_START) == 2
            and text.count(IM_START) == 3
            and PROMPT_AFTER[:40] in text
        )
        np.testing.assert_array_equal(
            segment.images[0].patches, runtime.processor.image(target).patches
        )
        np.testing.assert_array_equal(
            segment.images[1].patches, runtime.processor.image(render).patches
        )


def test_an_answer_that_can_be_read_is_a_score_and_is_not_asked_again(
    policy, runtime, directory, monkeypatch
):
    settings(runtime, "local", path=directory, batch_size=2, prompt_length=1024, max_tokens=8)
    with runtime.judge() as judge:
        monkeypatch.setattr(judge, "_answers", lambda batch, windows: [GOOD] * len(batch))
        future = judge.submit(*pictures(policy, 1)[0])
        judge.finish()
        assert future.result().score == pytest.approx(0.8)
        assert judge.submit(*pictures(policy, 1)[0]).done()


def test_a_question_too_long_for_its_bucket(policy, runtime, directory):
    settings(
        runtime,
        "local",
        path=directory,
        batch_size=2,
        prompt_length=64,
        max_tokens=8,
        max_failures=1,
    )
    with runtime.judge() as judge:
        future = judge.submit(*pictures(policy, 1)[0])
        judge.finish()
        with pytest.raises(JudgeDown, match=r"exceeds judge.prompt_length=64"):
            future.result()


def test_back_ends_are_chosen_by_name(runtime):
    runtime.config.reward.beta = 0.0
    with settings(runtime, "none").judge() as judge:
        assert judge is None
    with settings(runtime, "visual").judge() as judge:
        assert judge.name == "visual"
    with settings(runtime, "http").judge() as judge:
        assert isinstance(judge, HttpJudge)


def test_what_is_missing_is_said(runtime):
    runtime.config.reward.beta = 0.4
    with pytest.raises(
        ConfigError, match=r"reward.beta=0.4 needs a judge, but reward.judge is 'none'"
    ):
        grpo._check(settings(runtime, "none").config, hosts=1, ways=1)
    with pytest.raises(
        ConfigError, match=r"reward.judge='oracle': use one of none, http, local, visual"
    ):
        settings(runtime, "oracle").judge()
    with pytest.raises(ConfigError, match=r"judge.path='nowhere'"):
        settings(runtime, "local", path="nowhere").judge()
    with pytest.raises(ConfigError, match=r"judge.url='elsewhere'"):
        settings(runtime, "http", url="elsewhere").judge()


def test_caches_of_scores_are_in_the_work_directory(policy, runtime, tmp_path):
    assert isinstance(settings(runtime, "visual").judge()._cache, VerdictCache)
    with settings(runtime, "visual").judge() as judge:
        judge.submit(*pictures(policy, 1)[0]).result()
    assert list((tmp_path / "judge").glob("verdicts-0.jsonl"))
