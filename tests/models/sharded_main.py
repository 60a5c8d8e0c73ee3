"""Runs in its own process with 8 simulated devices: loss, gradients (of weights and adapters) and
decoding on several meshes against one.

Prints one JSON object: {"<data>x<fsdp>x<tensor>": {"gradient": max relative error, "loss",
"decode": errors, "cut": leaves that are cut, "received": bytes that reach a device while one token
a row is decoded, "kernels": bytes of the decoder that it does not hold}}.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mmrecoder_jax.models import weights
from mmrecoder_jax.models.config import LoraConfig
from mmrecoder_jax.models.decoding import (
    Rows,
    by_layer,
    decode_step,
    decoding_weights,
    empty_cache,
)
from mmrecoder_jax.models.lora import is_adapter
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params, no_past
from mmrecoder_jax.models.sharding import batch_sharding, make_mesh, param_shardings
from mmrecoder_jax.models.trees import join, split
from mmrecoder_jax.planner import hlo
from tests.models.conversation import conversation, model_inputs, small_config, stack_images
from tests.models.parity import random_tensors

CONFIG, PLAIN = small_config(remat="full", lora=LoraConfig(4, 8.0)), small_config(remat="full")
segments = [conversation(CONFIG, [(56, 84)], seed) for seed in range(8)]
arrays, rows = stack_images([image for segment in segments for image in segment.images])
inputs = model_inputs(segments, 64, rows=rows)
net = Qwen25VL(CONFIG)
FEATURES = arrays[2].size // CONFIG.vision.merge_patches


def loss(params, arrays, inputs):
    variables = {"params": params}
    features = net.apply(variables, *arrays, method="encode_images")
    logits = net.apply(
        variables, net.apply(variables, **inputs, vision_features=features), method="logits"
    )
    logps = jnp.take_along_axis(
        jax.nn.log_softmax(logits[:, :-1]), inputs["tokens"][:, 1:, None], -1
    )[..., 0]
    return -jnp.mean(logps, where=inputs["segment_ids"][:, 1:] > 0)


def decode(params, arrays, inputs):
    """A prompt and a token behind it: the scores of the next."""
    features = net.apply({"params": params}, *arrays, method="encode_images")
    prompt = [inputs[name][..., :40] for name in ("tokens", "positions", "vision_index")]
    _, kept = net.apply(
        {"params": params},
        *prompt,
        features,
        jnp.full(8, 40),
        *no_past(CONFIG, 8),
        method="extend",
    )
    prefix = by_layer(kept, CONFIG)
    own = empty_cache(CONFIG, 8, 4)
    return step(decoding_weights(params, CONFIG), prefix, own, inputs)[0]


def step(weights, prefix, own, inputs):
    """One token a row, as in sampling; each row reads the prefix of its own place."""
    local = jnp.arange(8) % (8 // row_parts())
    rows = Rows(local[:, None], local, jnp.full(8, 40), jnp.zeros(8, jnp.int32))
    token, position = inputs["tokens"][:, 40], inputs["positions"][:, 0, 40]
    live = jnp.ones(8, bool)
    return decode_step(net, weights, token, position, live, prefix, own, rows, ((40, 20), (4, 2)))


def row_parts():
    """Parts that the rows are cut into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def traffic(params, inputs, shape):
    """(bytes that a device receives in `step`, bytes that gathering the decoder over fsdp would
    bring it).
    """
    weights = jax.jit(functools.partial(decoding_weights, config=CONFIG))(params)
    weights = jax.device_put(weights, param_shardings(weights, jax.sharding.get_mesh()))
    caches = jax.device_put(
        (empty_cache(CONFIG, 8, 40), empty_cache(CONFIG, 8, 4)),
        batch_sharding(jax.sharding.get_mesh()),
    )
    compiled = jax.jit(step).lower(weights, *caches, inputs).compile()
    received = sum(hlo.collectives(compiled.as_text()).bytes.values())
    leaves = jax.tree.leaves(params["model"])
    cut = sum(leaf.nbytes for leaf in leaves if "fsdp" in leaf.sharding.spec)
    return received, cut // shape[2] * (1 - 1 / shape[1])


def compute(params, arrays, inputs):
    value, gradient = jax.jit(jax.value_and_grad(loss))(params, arrays, inputs)
    return jax.device_get((value, gradient, jax.jit(decode)(params, arrays, inputs)))


abstract = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
tensors, rng = random_tensors(CONFIG), np.random.default_rng(0)
adapters = jax.tree.map(
    lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), split(abstract, is_adapter)[0]
)


def policy(shardings):
    """Weights read shard by shard, adapters beside them."""
    mine, others = split(shardings, is_adapter) if shardings else (None, None)
    return join(weights.from_tensors(tensors, PLAIN, others), jax.device_put(adapters, mine))


with jax.default_matmul_precision("highest"):
    value, gradient, hidden = compute(policy(None), arrays, inputs)
    report = {}
    for shape in json.loads(sys.argv[1]):
        mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        with jax.set_mesh(mesh):
            params = policy(param_shardings(abstract, mesh))
            cut = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
            ways = shape[0] * shape[1]
            # a row counts from the first feature of its device's part
            first = np.arange(8)[:, None] * ways // 8 * (FEATURES // ways)
            index = inputs["vision_index"]
            local = inputs | {"vision_index": np.where(index < 0, index, index - first)}
            batch = jax.device_put((arrays, local), batch_sharding(mesh))
            received, kernels = traffic(params, batch[1], shape)
            other_value, other_gradient, other_hidden = compute(params, *batch)
        errors = jax.tree.map(
            lambda a, b: float(np.abs(a - b).max() / (np.abs(a).max() + 1e-4)),
            gradient,
            other_gradient,
        )
        report["x".join(map(str, shape))] = {
            "loss": float(abs(value - other_value)),
            "gradient": max(jax.tree.leaves(errors)),
            "decode": float(np.abs(hidden - other_hidden).max()),
            "cut": cut,
            "received": received,
            "kernels": kernels,
        }
print(json.dumps(report))
