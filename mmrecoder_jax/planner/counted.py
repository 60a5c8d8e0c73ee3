"""What a program takes and receives, counted from its shapes: for devices no compiler is here for.

All numbers are of one device. With d devices that rows are cut over, T = tokens / d, t = `tensor`:

    one layer          w = 2 I + 4 H + (heads + 2 key heads) * head_dim values a token, / t
    gradients keep     layers * T * H values (recomputed layers), or layers * T * w
    and work in        2 T w values, two layers' weights, the head and three float32 blocks of
                       `loss_chunk` * vocab / t
    a rollout works in T w values, one layer's weights and the head; decoding in three blocks of
                       rows / d * vocab / t
    d > 1: the weights are gathered forward and back, the gradients scattered; a decoding step
                       sends its rows instead where they are fewer bytes
    t > 1: two exchanges of T * H values a layer, forward and back

Attention is taken to be fused: no scores are kept. `docs/memory.md` holds these numbers beside what
the TPU compiler says.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mmrecoder_jax.learner.update import sum_type
from mmrecoder_jax.models.trees import split
from mmrecoder_jax.planner.programs import Program, Programs

FLOAT32 = 4


def local_bytes(tree: object) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def chosen_bytes(programs: Programs, chosen: Callable[[str], bool]) -> int:
    """Bytes on one device of the parameters that a function chooses by their paths."""
    return local_bytes(split(programs.params, chosen)[0])


def sum_bytes(programs: Programs) -> int:
    """Bytes on one device of the sums of gradients over micro-batches."""
    trained = split(programs.params, programs.trained)[0]
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * sum_type(x.dtype).itemsize
        for x in jax.tree.leaves(trained)
    )


def temporaries(programs: Programs, program: Program) -> int:
    """Bytes that a program works in, besides what it reads."""
    c, tensor = programs.sizes, programs.mesh.shape["tensor"]
    value = jnp.dtype(c.dtype).itemsize
    gathered = programs.ways > 1
    head = c.vocab_size * c.hidden_size // tensor * value if gathered else 0
    layers = _layer_weights(programs) // tensor * value if gathered else 0
    if program == Program.UPDATE and programs.micro_batches > 1:
        return 0
    tokens, width = _tokens(programs, program), _width(programs)
    if program.samples:
        logits = _rows(programs, program) * c.vocab_size // tensor * FLOAT32
        blocks = 3 if program == Program.DECODE else 1
        return tokens * width * value + layers + head + blocks * logits + _images(programs, program)
    kept = c.num_layers * tokens * (c.hidden_size if c.remat == "full" else width) * value
    chunk = min(programs.config.model.loss_chunk, tokens)
    loss = 3 * chunk * (c.vocab_size // tensor) * FLOAT32
    found = kept + 2 * tokens * width * value + 2 * layers + 2 * head + loss
    if program == Program.UPDATE:  # its own gradients, which no sum holds
        found += chosen_bytes(programs, programs.trained)
    return found + _images(programs, program)


def received(programs: Programs, program: Program) -> dict[str, int]:
    """Bytes that one call receives from other devices, by kind of collective."""
    c, tensor, ways = programs.sizes, programs.mesh.shape["tensor"], programs.ways
    value = jnp.dtype(c.dtype).itemsize
    share = (ways - 1) / ways
    weights = _weights(programs) // tensor * value * share
    layers_rows = c.num_layers * _tokens(programs, program) * c.hidden_size * value
    between = 2 * layers_rows * 2 * (tensor - 1) / tensor  # two all-reduces a layer
    found = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0}
    if program == Program.UPDATE and programs.micro_batches > 1:
        return {}
    if program == Program.DECODE:
        exchanged = _rows(programs, program) * ways * c.num_layers * _width(programs) * value * 2
        found["all-gather"] = min(weights, exchanged * share)
        found["all-reduce"] = between
    elif program.samples:
        found["all-gather"], found["all-reduce"] = weights, between
    else:
        trained = chosen_bytes(programs, programs.trained) * ways * share
        found["all-gather"] = 2 * weights
        # Gradients are summed in the type of compute.
        found["reduce-scatter"] = trained * value / jnp.dtype(c.param_dtype).itemsize
        found["all-reduce"] = 2 * between
    return {kind: round(size) for kind, size in found.items() if size}


def _rows(programs: Programs, program: Program) -> int:
    return math.ceil(programs.rows(program) / programs.ways)


def _tokens(programs: Programs, program: Program) -> int:
    if not program.samples:
        return math.ceil(programs.tokens / programs.ways)
    return _rows(programs, program) * programs.length(program)


def _width(programs: Programs) -> int:
    """Values that a layer makes of a token, on one device."""
    c = programs.sizes
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    return 4 * c.hidden_size + (2 * c.intermediate_size + heads) // programs.mesh.shape["tensor"]


def _layer_weights(programs: Programs) -> int:
    c = programs.sizes
    heads = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim
    return c.hidden_size * (heads + 3 * c.intermediate_size)


def _weights(programs: Programs) -> int:
    """Parameters of the decoder and its head: what a call gathers."""
    c = programs.sizes
    return c.num_layers * _layer_weights(programs) + c.vocab_size * c.hidden_size


def _images(programs: Programs, program: Program) -> int:
    """Of the vision tower, where it runs inside the program."""
    if not programs.encodes_images or program == Program.DECODE:
        return 0
    c, vision = programs.sizes, programs.sizes.vision
    count = programs.images(program) if program.samples else programs.shape.images
    patches = math.ceil(count / programs.ways) * programs.windows * vision.window_patches
    width = 4 * vision.hidden_size + 2 * vision.intermediate_size
    depth = 0 if program.samples else vision.depth * vision.hidden_size
    return patches * (depth + 2 * width) * jnp.dtype(c.dtype).itemsize
