"""Starting from a published directory: the trainer reads what `models.weights` wrote."""

import dataclasses

import jax
import numpy as np
import pytest

from mmrecoder_jax.config import ConfigError, load
from mmrecoder_jax.models.weights import save_pretrained


@pytest.fixture
def published(policy, tmp_path):
    stage = policy.stage
    save_pretrained(
        tmp_path,
        policy.params,
        stage.model.config,
        "float32",
        {"image_token_id": stage.tokenizer.image_pad_id},
    )
    config = load("stage2", "smoke")
    config.init_from = str(tmp_path)
    return dataclasses.replace(stage, config=config)


def test_published_weights_are_read(published, policy):
    for a, b in zip(
        jax.tree.leaves(published.initial_params()), jax.tree.leaves(policy.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_another_size_is_an_error(published):
    other = dataclasses.replace(published.model.config, rope_theta=7.0)
    with pytest.raises(ConfigError, match=r"model\.preset"):
        dataclasses.replace(
            published, model=dataclasses.replace(published.model, config=other)
        ).initial_params()
