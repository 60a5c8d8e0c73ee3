"""A tower that is not trained: an image is encoded once, and its features give the same loss and
gradients as its patches.
"""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax import grpo
from mmrecoder_jax.data.batching import BatchShape, Collate, TokenRow, pad_images
from mmrecoder_jax.data.pipeline import learner_batch
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.learner_batch import learner_rows
from mmrecoder_jax.rl.trajectory import Mode
from mmrecoder_jax.rl.vision_features import FrozenTower
from tests.rl.test_rollout import ScriptedEnv


@pytest.fixture
def tower(policy):
    stage = policy.stage
    return FrozenTower(stage.model, stage.mesh, stage.layout, (6, 12))


@pytest.fixture(scope="module")
def engines(policy):
    """The same sampler choices with the tower trained and frozen."""
    short = {"rl.response_length": 12, "rl.decode_chunk": 5}
    made = [
        policy.stage_with(short | {"model.freeze_vision": frozen}).engine(ScriptedEnv(), 1.0)
        for frozen in (False, True)
    ]
    assert made[0].tower is None
    return made


def test_an_image_is_encoded_once_and_forgotten_with_its_image(policy, tower):
    processor = policy.stage.processor
    # Pillow images: the processor keeps no patches of those
    images = [processor.image(picture(size)) for size in ((56, 84), (112, 168), (56, 84))]
    tower.encode(policy.params, [*images, images[0]])
    tower.encode(policy.params, images[:2])
    assert tower.encoded == 3
    layout = policy.stage.layout
    arrays = tower.arrays(images, 4, 12, layout)
    assert arrays["features"].shape == (4, 12 * layout.window_patches // 4, 128)
    whole = policy.stage.model.apply(
        {"params": policy.params},
        *map(jnp.asarray, pad_images(images, 4, 12, layout).values()),
        method="encode_images",
    ).reshape(arrays["features"].shape)
    for i, image in enumerate(images):
        np.testing.assert_allclose(
            arrays["features"][i, image.slots], whole[i, image.slots], atol=1e-5
        )
    held = [weakref.ref(image) for image in images]
    del image, images
    assert not any(image() for image in held)


def picture(size):
    return Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (*size, 3), np.uint8))


def test_an_image_that_was_not_encoded_is_refused(policy, tower):
    image = policy.stage.processor.image(picture((56, 56)))
    with pytest.raises(KeyError):
        tower.arrays([image], 1, 6, policy.stage.layout)
    assert not tower.arrays([None], 1, 6, policy.stage.layout)["features"].any()


@pytest.mark.parametrize(
    "mode", [Mode.FULL_TRAJECTORY, pytest.param(Mode.SHARED_FIRST_TURN, marks=pytest.mark.slow)]
)
def test_both_turns_and_the_update_take_the_features_of_one_encoding(policy, engines, mode):
    stage, groups, losses = policy.stage, [], []
    advantages = np.linspace(-1, 1, 4).reshape(2, 2, 1).repeat(2, axis=2)
    frozen = engines[1]
    before = frozen.tower.encoded
    for engine in engines:
        engine.env.asked = 0
        groups.append(
            engine.rollout(
                policy.params, policy.charts[:2], [3, 4], jax.random.key(7), mode=mode, group=2
            )
        )
        rows = learner_rows(groups[-1], advantages, mode, mask_truncated=False)
        batch = learner_batch(
            rows,
            Collate(
                BatchShape(4, (264,), (12,), 8, sampled=True),
                stage.layout,
                image_arrays=engine.image_arrays,
            ),
        )
        assert ("features" in batch) == ("patches" not in batch) == (engine is frozen)
        micro = jax.tree.map(lambda x: x[0], distributed.to_global(batch, stage.mesh, axis=1))
        decoder, visual = {"model": policy.params["model"]}, {"visual": policy.params["visual"]}

        def loss(params, micro, visual=visual):
            return grpo.make_loss(stage.config, stage.token_logps())(params | visual, micro)[0]

        with jax.set_mesh(stage.mesh):
            losses.append(jax.jit(jax.value_and_grad(loss))(decoder, micro))
    for group, again in zip(*groups, strict=True):
        for t, u in zip(group, again, strict=True):
            assert [list(turn.ids) for turn in t.turns] == [list(turn.ids) for turn in u.turns]
    images = {
        id(image)
        for group in groups[1]
        for t in group
        for piece in t.pieces
        for image in piece.images
    }
    assert 0 < frozen.tower.encoded - before <= len(images)
    np.testing.assert_allclose(losses[0][0], losses[1][0], atol=1e-6)
    for a, b in zip(jax.tree.leaves(losses[0][1]), jax.tree.leaves(losses[1][1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * float(np.abs(a).max()))


def test_the_update_without_the_tower_computes_less(policy, engines):
    """Operations of the compiled gradient, with patches and with features: the tower is not in the
    second.
    """
    stage = policy.stage
    engine = engines[1]
    engine.env.asked = 0
    groups = engine.rollout(policy.params, policy.charts[:2], [3, 4], jax.random.key(7), group=2)
    rows = [TokenRow(t.pieces, (1, 2), 1.0) for group in groups for t in group]
    flops = []
    for arrays in (pad_images, engine.image_arrays):
        batch = learner_batch(
            rows,
            Collate(
                BatchShape(4, (264,), (12,), 8, sampled=True), stage.layout, image_arrays=arrays
            ),
        )
        micro = jax.tree.map(lambda x: x[0], batch)
        loss = grpo.make_loss(stage.config, stage.token_logps())
        lowered = jax.jit(loss).lower(policy.params, micro)
        flops.append(lowered.cost_analysis()["flops"])
    assert flops[1] < 0.8 * flops[0]
