"""The files beside the weights: turns by the chat template, and settings that two releases read."""

import json

import jinja2
import pytest

from mmrecoder_jax.data import synthetic
from mmrecoder_jax.models.export import chat_template, save_tokenizer
from mmrecoder_jax.models.processor import Processor
from mmrecoder_jax.models.tokenizer import load_tokenizer, train_sentencepiece
from tests.models.conversation import picture, small_config


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentencepiece(synthetic.tokenizer_texts(500, 0), 512, synthetic.words())


def rendered(template, messages):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers has it
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize("system", [None, "You are a helpful assistant.", 'Say "no" \\ ö\nTwice.'])
def test_turns_are_those_of_the_processor(tokenizer, system):
    ours = Processor(tokenizer, small_config().vision, 28 * 28, 64 * 28 * 28, system)
    image = ours.image(picture(56, 84, 0))
    parts = [
        ours.first_prompt("Draw.", image).ids,
        ours.response("plt.bar()"),
        ours.feedback_prompt("Improve it.", [image, image], closed=True).ids,
    ]
    question = [{"type": "image"}, {"type": "text", "text": "Draw."}]
    feedback = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Improve it."}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "plt.bar()"},
        {"role": "user", "content": feedback},
    ]
    text = rendered(chat_template(system), messages)
    pad = "<|image_pad|>"
    expected = tokenizer.encode(text.replace(pad, pad * len(image.slots)))
    assert [i for part in parts for i in part.tolist()] == expected


def test_a_system_message_of_the_conversation_replaces_the_runs_own():
    messages = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Draw."}]
    text = rendered(chat_template("Ours."), messages)
    assert "Mine." in text and "Ours." not in text and text.count("system") == 1


def test_a_list_that_one_release_cannot_read_gets_the_name_that_both_know(tokenizer, tmp_path):
    """As work directories of earlier versions have it."""
    save_tokenizer(tmp_path / "a", tokenizer, None)
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(json.dumps({"extra_special_tokens": ["<|im_start|>"], "chat_template": "x"}))
    for name in ("tokenizer.model", "chat_template.jinja"):
        (tmp_path / "a" / name).unlink()
    save_tokenizer(tmp_path / "b", load_tokenizer(tmp_path / "a"), None)
    fields = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert fields == {"additional_special_tokens": ["<|im_start|>"], "chat_template": "x"}
    assert not (tmp_path / "b" / "chat_template.jinja").exists()  # there is one already
