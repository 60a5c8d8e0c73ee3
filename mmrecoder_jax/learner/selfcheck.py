"""Whether this machine computes attention rightly: the chosen kernels beside plain matmuls.

A fused kernel can be wrong on one card and right on the next, in its gradients alone, and nothing
but NaN parameters shows it afterwards. Two comparisons, in seconds:

    attention     each shape that training uses (windows, whole images, rows of text), output and
                  gradients, beside float64 in NumPy; some windows and ends of rows are padding
    the model     loss and gradients of one small batch through the configured widths, one or two
                  layers deep, beside the same model with attention=xla

Errors are norms of differences relative to the norm of what is right.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from mmrecoder_jax.config import ConfigError, model_config
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.attention import LANES, attend, choose
from mmrecoder_jax.models.config import Kernel, LoraConfig, ModelConfig
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params, visual_tokens
from mmrecoder_jax.models.sharding import make_mesh, mesh_platform, param_shardings

# Largest error by type of compute. In bfloat16, right kernels differ from float64 by 0.4 % and, in
# the gradients of a model, from each other by 2 % (splash interpreted, `:tiny`).
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
# The model's errors may be so many times larger: each layer adds its rounding.
THROUGH_MODEL = 2.0
VOCABULARY = 512  # rows of the table: the loss needs few, and the table would be most of the memory
# Padding begins behind this share of a row.
FILLED = 0.7

# What JAX raises where a kernel cannot be compiled for a card, or fails on it.
_KERNEL_FAILURES = (ValueError, RuntimeError)

Params = Any
QKV = tuple[Array, Array, Array]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One compared number.

    Attributes:
      what: was compared.
      kernel: that computed it.
      error: relative; NaN where either side was not finite.
      allowed: the largest error that is right.
      failure: why the kernel gave nothing, where it does not compile or run.
    """

    what: str
    kernel: str
    error: float
    allowed: float
    failure: str = ""

    @property
    def right(self) -> bool:
        return self.error <= self.allowed  # NaN is not


def settle_attention(config: ConfigDict) -> str | None:
    """Sets `model.attention` to xla where the kernels of "auto" compute something else.

    Kernels apply on GPU and TPU alone: elsewhere nothing is checked.

    Returns:
      What to tell the user, or None where nothing was found.

    Raises:
      ConfigError: kernels asked for by name, or plain matmuls, compute something else.
    """
    if mesh_platform() == "cpu":
        return None
    wrong = [finding for finding in check(config) if not finding.right]
    if not wrong:
        return None
    worst = "; ".join(
        f"{f.what} through {f.kernel}: {f.failure or f'error {f.error:.2g}'}" for f in wrong[:2]
    )
    plain = all(finding.kernel == Kernel.XLA for finding in wrong)
    if plain or config.model.attention != Kernel.AUTO:
        remedy = "another version of jax or its plugin" if plain else "--config.model.attention=xla"
        raise ConfigError(
            f"model.attention={config.model.attention!r} computes wrong numbers on this machine "
            f"({worst}): use {remedy}; --selfcheck shows all of them"
        )
    config.model.attention = str(Kernel.XLA)
    return f"model.attention=xla: the self-check found kernels that are wrong here ({worst})"


def check(config: ConfigDict) -> list[Finding]:
    """Compares what the configuration's model would compute with what is right."""
    sizes = model_config(config)
    axes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    mesh = make_mesh(*axes, slices=config.mesh.slices)
    length, windows = min(config.data.lengths), min(config.data.windows)
    found = [*check_attention(sizes, length, windows), *check_model(sizes, mesh, length, windows)]
    # Hosts must come to one conclusion, so each takes the worst error of all.
    errors = np.array([np.inf if math.isnan(f.error) else f.error for f in found])
    worst = distributed.global_max(errors)
    return [
        dataclasses.replace(f, error=float(error)) for f, error in zip(found, worst, strict=True)
    ]


def format_findings(config: ConfigDict, findings: Sequence[Finding]) -> str:
    """A table for people, and a last line that says whether all is right."""
    width = max(len(finding.what) for finding in findings)
    device = jax.devices()[0]
    lines = [
        f"model.attention={config.model.attention} model.dtype={config.model.dtype} on "
        f"{device.device_kind} ({device.platform}), jax {jax.__version__}",
        f"{'what':{width}} | kernel | error   | allowed",
    ]
    lines += [
        f"{f.what:{width}} | {f.kernel:6} | {f.error:7.1e} | {f.allowed:.0e}"
        + ("" if f.right else f"  {f.failure or 'WRONG'}")
        for f in findings
    ]
    wrong = sum(not finding.right for finding in findings)
    lines.append(f"{wrong} of {len(findings)} are wrong" if wrong else "all are right")
    return "\n".join(lines)


# ------------------------------------------------------------ attention alone


def check_attention(sizes: ModelConfig, length: int, windows: int) -> Iterator[Finding]:
    """Each shape of attention that training uses, beside NumPy in float64.

    Args:
      length: tokens of a row.
      windows: per image.
    """
    vision, patches = sizes.vision, sizes.vision.window_patches
    # Lengths are cut so that NumPy takes seconds; what chooses a kernel is left as it is.
    image, row = _short(windows * patches), _short(length)
    shapes = {
        f"windows of {patches} patches": (4, patches, vision.num_heads, vision.num_heads, None),
        f"an image of {image} patches": (2, image, vision.num_heads, vision.num_heads, None),
        f"a row of {row} tokens": (2, row, sizes.num_heads, sizes.num_kv_heads, 0),
    }
    for name, (rows, count, heads, kv_heads, causal_from) in shapes.items():
        features = sizes.head_dim if causal_from == 0 else vision.head_dim
        sharing = min(heads // kv_heads, 4)  # query heads per key head; one key head is enough
        yield from _compare_attention(name, sizes, rows, count, sharing, features, causal_from)


def _short(length: int) -> int:
    return min(length, 2 * LANES) if length % LANES == 0 else min(length, 2 * LANES - LANES // 2)


def _compare_attention(
    name: str,
    sizes: ModelConfig,
    rows: int,
    length: int,
    heads: int,
    features: int,
    causal_from: int | None,
) -> Iterator[Finding]:
    rng = np.random.default_rng(0)

    def normal(count: int) -> Array:
        return jnp.asarray(rng.standard_normal((rows, length, count, features)), sizes.dtype)

    qkv, slope = (normal(heads), normal(1), normal(1)), normal(heads)
    segments = _padded(rows, length)

    def value(qkv: QKV) -> Array:
        where = jnp.asarray(segments)
        return attend(*qkv, where, where, causal_from, sizes.attention)

    @jax.jit
    def both(qkv: QKV, slope: Array) -> tuple[Array, QKV]:
        out, backward = jax.vjp(value, qkv)
        return out, *backward(slope)

    kernel = choose(
        sizes.attention,
        mesh_platform(),
        qkv[0].shape,
        qkv[1].shape,
        sizes.dtype,
        causal_from,
    )
    slope = slope * (segments > 0)[:, :, None, None]  # nobody reads padding
    allowed = TOLERANCE[sizes.dtype]
    parts = ("output", *(f"gradient of {letter}" for letter in "qkv"))
    try:
        with jax.default_matmul_precision("highest"):
            out, gradients = jax.device_get(both(qkv, slope))
    except _KERNEL_FAILURES as error:
        for part in parts:
            yield Finding(f"{name}: {part}", kernel, math.nan, allowed, _first_line(error))
        return
    q, k, v, along = (np.asarray(x, np.float64) for x in (*qkv, slope))
    right, right_gradients = attention_by_hand(q, k, v, along, segments, causal_from == 0)
    read = (segments > 0)[:, :, None, None]
    compared = [(out * read, right * read), *zip(gradients, right_gradients, strict=True)]
    for part, pair in zip(parts, compared, strict=True):
        yield Finding(f"{name}: {part}", kernel, relative(*pair), allowed)


def _padded(rows: int, length: int) -> Int[np.ndarray, "B L"]:
    """Segments of rows: whole, ending in padding, two packed, and (of four) all padding."""
    segments = np.ones((rows, length), np.int32)
    segments[1, int(FILLED * length) :] = 0
    if rows > 2:
        segments[2, length // 2 :] = 2
        segments[3] = 0
    return segments


def attention_by_hand(
    q: Float[np.ndarray, "B L H F"],
    k: Float[np.ndarray, "B S 1 F"],
    v: Float[np.ndarray, "B S 1 F"],
    slope: Float[np.ndarray, "B L H F"],
    segments: Int[np.ndarray, "B L"],
    causal: bool,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(output, gradients of q, k and v along `slope`) of one key head, in float64."""
    mask: Bool[np.ndarray, "B L S"] = segments[:, :, None] == segments[:, None, :]
    if causal:
        mask &= np.tri(segments.shape[1], dtype=bool)
    k, v, scale = k[:, :, 0], v[:, :, 0], q.shape[-1] ** -0.5
    scores = np.where(mask[:, None], np.einsum("blhf,bsf->bhls", q, k) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhls,bsf->blhf", weights, v)
    d_weights = np.einsum("blhf,bsf->bhls", slope, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    return out, (
        np.einsum("bhls,bsf->blhf", d_scores, k),
        np.einsum("bhls,blhf->bsf", d_scores, q)[:, :, None],
        np.einsum("bhls,blhf->bsf", weights, slope)[:, :, None],
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def relative(found: Any, right: Any) -> float:
    """Norm of the difference over the norm of what is right; NaN where anything is not finite."""
    found, right = np.asarray(found, np.float64), np.asarray(right, np.float64)
    if not np.isfinite(found).all() or not np.isfinite(right).all():
        return math.nan
    return float(np.linalg.norm(found - right)) / max(float(np.linalg.norm(right)), 1e-30)


# ------------------------------------------------------------ the model


def check_model(sizes: ModelConfig, mesh: Mesh, length: int, windows: int) -> Iterator[Finding]:
    """Loss and gradients of a small batch, beside the same model with attention=xla.

    Where plain matmuls are all that is used, only what is not finite can be wrong.
    """
    kept = cut(sizes)
    plain = dataclasses.replace(kept, attention=str(Kernel.XLA))
    abstract = jax.eval_shape(lambda: init_params(plain, jax.random.key(0)))
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        params = jax.jit(
            lambda: init_params(plain, jax.random.key(0)),
            out_shardings=param_shardings(abstract, mesh),
        )()
        rows = mesh.shape["data"] * mesh.shape["fsdp"] // jax.process_count()
        batch = distributed.to_global(small_batch(kept, rows, length, windows), mesh)
        kernel = _kernel_of(kept, length, windows)
        allowed = THROUGH_MODEL * TOLERANCE[sizes.dtype]
        try:
            found = right = jax.block_until_ready(_loss_and_gradients(kept, params, batch))
        except _KERNEL_FAILURES as error:
            for what in ("loss", *PARTS.values()):
                yield Finding(f"model: {what}", kernel, math.nan, allowed, _first_line(error))
            return
        if kernel != Kernel.XLA:
            right = _loss_and_gradients(plain, params, batch)
        loss_error = relative(found[0], right[0])
        squares = jax.device_get(_squares(found[1], right[1]))
    yield Finding("model: loss", kernel, loss_error, allowed)
    modules: dict[str, np.ndarray] = {}  # a kernel and its bias are one: biases can be all noise
    for path, of_leaf in jax.tree_util.tree_leaves_with_path(
        squares, is_leaf=lambda x: isinstance(x, np.ndarray)
    ):
        module = "/".join(key.key for key in path[:-1])
        modules[module] = modules.get(module, np.zeros(2)) + of_leaf
    for part, title in PARTS.items():
        own = [m for m in modules if part == next(p for p in PARTS if p in m)]
        errors = {m: math.sqrt(modules[m][0] / max(modules[m][1], 1e-30)) for m in own}
        worst = max(errors, key=lambda m: math.inf if math.isnan(errors[m]) else errors[m])
        yield Finding(f"model: {title}, {worst}", kernel, errors[worst], allowed)


# Parameters by the layers that they belong to.
PARTS = {
    "blocks/window": "gradients of window layers",
    "blocks/full": "gradients of full layers",
    "visual/": "gradients of the rest of the tower",
    "": "gradients of the decoder",
}


def cut(sizes: ModelConfig) -> ModelConfig:
    """The model's widths, one layer of each kind deep, and a small vocabulary."""
    vision = dataclasses.replace(sizes.vision, depth=2, fullatt_block_indexes=(1,))
    return dataclasses.replace(
        sizes,
        vision=vision,
        num_layers=1,
        vocab_size=min(sizes.vocab_size, VOCABULARY),
        scan_unroll=1,
        lora=LoraConfig(),
    )


def small_batch(sizes: ModelConfig, rows: int, length: int, windows: int) -> dict[str, np.ndarray]:
    """Rows of noise with one image each; ends of rows and of images are padding."""
    rng = np.random.default_rng(jax.process_index())
    vision = sizes.vision
    shape = (rows, windows, vision.window_patches)
    valid = np.zeros(shape, bool)
    valid[:, : max(1, int(FILLED * windows))] = True
    valid[:, 0, vision.merge_patches :] = vision.window_patches == vision.merge_patches
    valid[:, 0, : vision.merge_patches] = True  # one cell alone in a window
    segments = np.ones((rows, length), np.int32)
    segments[:, int(FILLED * length) :] = 0
    per_image = windows * vision.window_patches // vision.merge_patches
    cells = np.flatnonzero(valid[0].reshape(per_image, -1)[:, 0])[: length // 2]
    index = np.full((rows, length), -1, np.int32)
    index[:, 1 : 1 + len(cells)] = cells  # each row on the images of its own device
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, 3, length))
    row, column = np.divmod(np.arange(windows * vision.window_patches, dtype=np.int32), 8)
    where = np.stack([row, column], axis=-1).reshape(1, windows, vision.window_patches, 2)
    patches = rng.standard_normal((*shape, vision.patch_dim)) * valid[..., None]
    return {
        "tokens": rng.integers(0, sizes.vocab_size, (rows, length)).astype(np.int32),
        "segment_ids": segments,
        "vision_index": index,
        "positions": positions,
        "patches": patches.astype(jnp.dtype(sizes.dtype)),
        "patch_positions": np.repeat(where, rows, axis=0),
        "patch_valid": valid,
    }


def _loss_and_gradients(
    sizes: ModelConfig, params: Params, batch: dict[str, Array]
) -> tuple[Array, Params]:
    model = Qwen25VL(sizes)

    def loss(params: Params) -> Array:
        features = visual_tokens(model, params, batch)
        names = ("tokens", "positions", "segment_ids", "vision_index")
        hidden = model.apply({"params": params}, *(batch[name] for name in names), features)
        logits = model.apply({"params": params}, hidden, method=Qwen25VL.logits)
        assert isinstance(logits, jax.Array)  # without `mutable`, flax returns the output alone
        logps = jax.nn.log_softmax(logits[:, :-1])
        targets = batch["tokens"][:, 1:, None]
        weights = (batch["segment_ids"][:, 1:] > 0).astype(jnp.float32)
        chosen = jnp.take_along_axis(logps, targets, axis=-1)[..., 0]
        return -(weights * chosen).sum() / weights.sum()

    where = jax.tree.map(lambda x: x.sharding, params)
    return jax.jit(jax.value_and_grad(loss), out_shardings=(None, where))(params)


@jax.jit
def _squares(found: Params, right: Params) -> Params:
    """Leaf by leaf, the sums of squares of the difference and of what is right, `[2]`."""

    def sums(found: Array, right: Array) -> Array:
        found, right = found.astype(jnp.float32), right.astype(jnp.float32)
        return jnp.stack([jnp.sum((found - right) ** 2), jnp.sum(right**2)])

    return jax.tree.map(sums, found, right)


def _kernel_of(sizes: ModelConfig, length: int, windows: int) -> str:
    """What computes the model's rows or whole images, where it is not plain matmuls."""
    vision = sizes.vision
    image = (1, windows * vision.window_patches, vision.num_heads, vision.head_dim)
    row = (1, length, sizes.num_heads, sizes.head_dim)
    chosen = [
        choose(sizes.attention, mesh_platform(), shape, shape, sizes.dtype, start)
        for shape, start in ((row, 0), (image, None))
    ]
    return next((kernel for kernel in chosen if kernel is not Kernel.XLA), Kernel.XLA)
