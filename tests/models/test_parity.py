"""Against the reference itself, where torch is installed: every case, gradients of every tensor, greedy continuations, packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.models.processor import rope_positions
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_cache
from mmrecoder_jax.models.weights import from_tensors
from tests.models.conversation import small_config
from tests.models.parity import ATOL, CASES, CONFIG, IMAGE_TOKEN, compact, inputs_of, our_side, random_tensors

torch = pytest.importorskip("torch")
reference = pytest.importorskip("tests.models.reference")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params():
    return from_tensors(random_tensors(), CONFIG)


@pytest.fixture(scope="module")
def model():
    return reference.reference_model()


side = jax.jit(our_side)


@pytest.mark.parametrize("name", CASES)
def test_features_and_logits(params, model, name):
    theirs = reference.reference_side(model, CASES[name])
    ours = compact(CASES[name], *side(params, *inputs_of(CASES[name])))
    for what, x in theirs.items():
        np.testing.assert_allclose(ours[what], x, atol=ATOL, err_msg=what)


@pytest.mark.parametrize("name", CASES)
def test_positions(model, name):
    case = CASES[name]
    inputs = reference.reference_inputs(case)
    mask = inputs["attention_mask"]
    theirs, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw"), attention_mask=mask
    )
    for b, segment in enumerate(case.segments):
        ours = rope_positions(segment.ids, segment.grids, IMAGE_TOKEN)
        np.testing.assert_array_equal(ours, theirs[:, b][:, mask[b].bool()].numpy())


def test_gradients_of_the_mean_token_log_probability(params, model):
    case = CASES["right-padded batch"]
    inputs = reference.reference_inputs(case)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    model.zero_grad()
    logps = torch.log_softmax(model(**inputs).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    logps[mask[:, 1:]].mean().backward()
    theirs = from_tensors({name: x.grad.numpy() for name, x in model.named_parameters()}, CONFIG)
    theirs["visual"]["patch_embed"]["proj"]["kernel"] /= 2  # both slices get the gradient of their sum

    arrays, ours_in = inputs_of(case)

    @jax.jit
    @jax.grad
    def gradient(params):
        logps = jax.nn.log_softmax(our_side(params, arrays, ours_in)[1][:, :-1])
        logps = jnp.take_along_axis(logps, ours_in["tokens"][:, 1:, None], -1)[..., 0]
        return jnp.mean(logps, where=ours_in["segment_ids"][:, 1:] > 0)

    def compare(path, a, b):
        scale = float(np.abs(b).max())
        # The bias of a key adds the same score to every key of a query, and nothing changes but by rotation: tiny, so compared absolutely.
        assert scale > 0 and float(np.abs(a - b).max()) < 1e-5 * scale + 1e-8, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, gradient(params), theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_continuations(tied):
    config = small_config(tie_word_embeddings=tied)
    tensors = {name: x for name, x in random_tensors(config).items() if not (tied and name == "lm_head.weight")}
    params, model = from_tensors(tensors, config), reference.reference_model(config)
    case, new = CASES["left-padded batch"], 8
    inputs = reference.reference_inputs(case)
    theirs = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)[:, -new:].numpy()

    arrays, padded = inputs_of(case)
    length = inputs["input_ids"].shape[1]
    prompt = {name: padded[name][..., -length:] for name in ("tokens", "positions", "vision_index")}
    valid = np.pad(padded["segment_ids"][:, -length:] > 0, [(0, 0), (0, new)], constant_values=True)

    @jax.jit
    def step(cache, tokens, positions, vision_index, features, start):
        net = Qwen25VL(config)
        variables = {"params": params}
        hidden, cache = net.apply(variables, tokens, positions, vision_index, features, cache, start, valid, method="extend")
        return jnp.argmax(net.apply(variables, hidden[:, -1], method="logits"), -1), cache

    features = Qwen25VL(config).apply({"params": params}, *arrays, method="encode_images")
    token, cache = step(init_cache(config, 2, length + new), **prompt, features=features, start=0)
    ours = [token]
    last = prompt["positions"][:, 0, -1]
    for i in range(new - 1):
        positions = np.broadcast_to((last + 1 + i)[:, None, None], (2, 3, 1))
        token, cache = step(cache, token[:, None], positions, np.full((2, 1), -1), None, length + i)
        ours.append(token)
    np.testing.assert_array_equal(np.stack(ours, 1), theirs)
