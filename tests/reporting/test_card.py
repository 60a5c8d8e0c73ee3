"""The card of an exported policy is true of its grammar and of what it was shown."""

import pytest

from mmrecoder_jax.config import load
from mmrecoder_jax.data import panels, synthetic
from mmrecoder_jax.env.chart_env import FeedbackImage
from mmrecoder_jax.reporting.card import Origin, model_card


def card_of(directory, stage="stage2", **fields):
    config = load(stage, "smoke")
    with config.unlocked():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return model_card(directory, Origin(config, "1", 3, (), {}))


@pytest.mark.parametrize(
    "image, said",
    [
        ("render", "The picture is the render itself."),
        ("difference", "white where the render equals the target"),
        ("both", "the render, and behind it the difference"),
        ("signed", "grey (128) where the render equals the target"),
    ],
)
def test_every_picture_of_a_feedback_is_described(tmp_path, image, said):
    assert said in card_of(tmp_path, feedback__image=image)


def test_no_two_pictures_are_described_alike():
    assert len({kind.description for kind in FeedbackImage}) == len(FeedbackImage)


def test_a_policy_that_has_seen_no_feedback_is_told_of_none(tmp_path):
    card = card_of(tmp_path, "sft_chart2code")
    assert "trained on first turns alone" in card and "A further turn" not in card


def test_the_limits_are_those_of_the_grammar(tmp_path):
    words = card_of(tmp_path, data__grammar="words")
    assert synthetic.DESCRIPTION in words and synthetic.BEYOND in words
    assert '| `data.grammar` | `"words"` |' in words
    drawn = card_of(tmp_path, data__grammar="panels")
    assert panels.DESCRIPTION in drawn and synthetic.DESCRIPTION not in drawn
    real = card_of(tmp_path, data__kind="directory", data__grammar="panels")
    assert "synthetic charts" not in real and "data.grammar" not in real


def test_a_policy_from_before_there_were_grammars_is_of_words(tmp_path):
    config = load("stage2", "smoke")
    with config.unlocked():
        del config.data.grammar
    assert synthetic.DESCRIPTION in model_card(tmp_path, Origin(config, "1", 3, (), {}))
