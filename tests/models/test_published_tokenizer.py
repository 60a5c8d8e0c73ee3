"""With Qwen's real vocabulary and the published chat template, where they can be had: ids, turns,
and what is never sampled.
"""

import base64
import inspect
import json

import jax
import matplotlib.axes
import matplotlib.pyplot
import numpy as np
import pytest
import transformers

from mmrecoder_jax.data.batching import Piece, VisionLayout, pad_prompts
from mmrecoder_jax.models.processor import Processor
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.models.tokenizer import VISION_TOKENS, PretrainedTokenizer, load_tokenizer
from mmrecoder_jax.models.weights import TOKEN_IDS, from_tensors
from mmrecoder_jax.rl.sampler import Places, Sampler, SamplerSpec
from tests.models.conversation import picture, small_config
from tests.models.parity import random_tensors
from tests.models.published_files import DASHSCOPE, QWEN3, TRL, package_file

ROWS = 152064  # of the published embedding
TOKENS = 151665  # of Qwen2.5's tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Qwen2.5's tokenizer: Qwen3's files without the four special tokens that Qwen3 has more."""
    whole = json.loads(
        package_file(QWEN3, "package/models/tokenizer.json").read_text(encoding="utf-8")
    )
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < TOKENS]
    directory = tmp_path_factory.mktemp("qwen")
    (directory / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory) -> PretrainedTokenizer:
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def reference(directory):
    """The same tokenizer as transformers reads it."""
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_ids_are_the_published_ones(tokenizer):
    assert isinstance(tokenizer, PretrainedTokenizer) and tokenizer.vocab_size == TOKENS
    assert (
        tokenizer.image_pad_id == TOKEN_IDS["image_token_id"]
        and tokenizer.token_id("<|vision_start|>") == TOKEN_IDS["vision_start_token_id"]
    )
    assert (
        tokenizer.token_id("<|vision_end|>") == TOKEN_IDS["vision_end_token_id"]
        and tokenizer.token_id("<|im_end|>") == TOKEN_IDS["eos_token_id"]
    )
    assert tokenizer.eos_ids == (151645, 151643) and tokenizer.pad_id == 151643
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]


def test_code_survives(tokenizer):
    for text in (
        inspect.getsource(matplotlib.pyplot),
        inspect.getsource(matplotlib.axes.Axes.bar),
        "Größe — 日本語 😀\n\tx = 'ü'\n",
    ):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < 151643


def test_every_token_is_the_one_of_qwens_own_list(reference):
    ranks = package_file(DASHSCOPE, "dashscope/resources/qwen.tiktoken").read_bytes().splitlines()
    published = {
        int(rank): base64.b64decode(token) for token, rank in (line.split() for line in ranks)
    }
    # bytes that stand for themselves
    alphabet = {chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = sorted(set(range(256)) - {ord(c) for c in alphabet})
    byte = {c: ord(c) for c in alphabet} | {chr(256 + i): value for i, value in enumerate(others)}
    ours = {
        rank: bytes(byte[c] for c in token)
        for token, rank in reference.get_vocab().items()
        if rank < 151643
    }
    assert ours == published and len(ours) == 151643


def test_turns_are_those_of_the_published_chat_template(tokenizer, reference):
    template = package_file(TRL, "trl/chat_templates/qwen2_5_vl.jinja").read_text(encoding="utf-8")
    system = "You are a helpful assistant."  # the template's own
    ours = Processor(tokenizer, small_config().vision, 28 * 28, 64 * 28 * 28, system)
    images = [
        ours.image(picture(*size, seed=i))
        for i, size in enumerate([(56, 84), (112, 56), (28, 28), (56, 28)])
    ]
    answers = ["```python\nplt.bar([1], [2])\n```", "second <think>", "third"]
    first = ours.first_prompt("Redraw this chart.", images[0])
    parts = [
        first.ids,
        ours.response(answers[0]),
        ours.feedback_prompt("Improve it.", images[1:2], closed=True).ids,
    ]
    parts += [
        ours.response(answers[1]),
        ours.feedback_prompt("The code failed:\nNameError", (), closed=True).ids,
    ]
    parts += [ours.response(answers[2]), ours.feedback_prompt("again", images[2:], closed=True).ids]

    def user(text, images):
        shown = [{"type": "image"}] * images
        return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}

    def assistant(text):
        return {"role": "assistant", "content": text}

    messages = [
        user("Redraw this chart.", 1),
        assistant(answers[0]),
        user("Improve it.", 1),
        assistant(answers[1]),
    ]
    messages += [
        user("The code failed:\nNameError", 0),
        assistant(answers[2]),
        user("again", 2),
    ]
    text = reference.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    # as the published processor does: as many placeholders as the image has visual tokens
    for image in images:
        text = text.replace("<|image_pad|>", "<|wait|>" * len(image.slots), 1)
    np.testing.assert_array_equal(
        np.concatenate(parts), tokenizer.encode(text.replace("<|wait|>", "<|image_pad|>"))
    )


def test_rows_without_a_token_and_vision_ids_are_never_sampled(tokenizer):
    """A model whose scores are highest there, 152,064 rows wide; every other row may be sampled,
    and gives text.
    """
    forbidden = tokenizer.forbidden_ids(ROWS)
    assert set(forbidden) == set(range(TOKENS, ROWS)) | {
        tokenizer.token_id(token) for token in VISION_TOKENS
    }
    assert len(forbidden) == 399 + 5 and tokenizer.token_id("<|im_end|>") not in forbidden
    config = small_config(vocab_size=ROWS, num_layers=1)
    tensors = random_tensors(config)
    tensors["lm_head.weight"] *= 0.2
    tensors["lm_head.weight"][list(forbidden)] *= 200
    params = from_tensors(tensors, config)
    layout = VisionLayout(
        tokenizer.image_pad_id,
        tokenizer.pad_id,
        config.vision.window_patches,
        config.vision.patch_dim,
    )
    ours = Processor(tokenizer, config.vision, 28 * 28, 4 * 28 * 28, system=None)
    prompt = ours.first_prompt("draw", ours.image(picture(56, 56, 0)))
    batch = pad_prompts([Piece.shown(prompt)] * 4, [()] * 4, 40, 1, 4, layout)
    mesh = make_mesh()
    drawn = []
    for temperature in (0.0, 1.0):
        spec = SamplerSpec(
            24,
            forbidden,
            (tokenizer.token_id("<|im_end|>"),),
            tokenizer.pad_id,
            temperature,
            chunk=24,
        )
        sampler = Sampler(Qwen25VL(config), spec, mesh)
        state = sampler.prefill(params, sampler.begin(Places(4, 4, 24, 40)), batch, np.arange(4))
        assert np.isin(np.asarray(state.prefix_logits).argmax(-1), forbidden).all()
        responses = sampler.answer(params, batch, range(4), jax.random.key(0))
        drawn.append(np.concatenate([response.ids for response in responses]))
        assert not np.isin(drawn[-1], forbidden).any()
        assert all(isinstance(tokenizer.decode([int(i)]), str) for i in drawn[-1])
    assert len(np.unique(drawn[1])) > 50
