"""The parts of both towers.

Matmuls run in `dtype`; norms and rotary angles are float32; parameters are kept in `param_dtype`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmrecoder_jax.models.config import LoraConfig, Remat
from mmrecoder_jax.models.sharding import constrain, matmul

# What is kept of a layer for its backward pass.
REMAT_POLICIES = {
    Remat.FULL: jax.checkpoint_policies.nothing_saveable,
    Remat.DOTS: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

Rope = tuple[Float[Array, "B L 1 half"], Float[Array, "B L 1 half"]]  # cos and sin; half is F / 2


def remat(layer: type[nn.Module], policy: str) -> type[nn.Module]:
    """The layer class, recomputed in the backward pass as `config.remat` says."""
    if policy == Remat.NONE:
        return layer
    # prevent_cse costs time and protects nothing here: a scan's body is never merged with another
    return nn.remat(layer, policy=REMAT_POLICIES[Remat(policy)], prevent_cse=False)


class Dense(nn.Module):
    """`x @ kernel + bias` on the last axis.

    `features` may be several axes: a fused q|k|v is `[D, 3, D]`, so that each part shards alike.
    Leading axes are flattened first: XLA's CPU back end is much faster on one plain matmul.

    A layer whose name is among `lora.targets` has a low-rank adapter beside its kernel. Adapters
    are float32 whatever `param_dtype` is: they are small, and they are what is trained.
    """

    features: int | tuple[int, ...]
    use_bias: bool
    dtype: str
    param_dtype: str
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "..."]:
        features = (self.features,) if isinstance(self.features, int) else self.features
        init = nn.initializers.normal(x.shape[-1] ** -0.5)
        kernel = self.param("kernel", init, (x.shape[-1], *features), self.param_dtype).astype(
            self.dtype
        )
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = matmul(flat, kernel, "/".join((*self.path, "kernel")))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, features, self.param_dtype).astype(
                self.dtype
            )
        if self.lora.rank and self.name in self.lora.targets:
            a = self.param("lora_a", init, (x.shape[-1], self.lora.rank), "float32").astype(
                self.dtype
            )
            b = self.param(
                "lora_b", nn.initializers.zeros, (self.lora.rank, *features), "float32"
            ).astype(self.dtype)
            y = y + self.lora.scale * (flat @ a @ b)
        return y.reshape(*x.shape[:-1], *features)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in float32."""

    eps: float
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x.astype(self.dtype) * weight.astype(self.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); with biases in the vision tower, without in the decoder."""

    features: int
    use_bias: bool
    dtype: str
    param_dtype: str
    lora: LoraConfig = LoraConfig()

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        def dense(name: str, features: int) -> Dense:
            return Dense(
                features, self.use_bias, self.dtype, self.param_dtype, self.lora, name=name
            )

        hidden = nn.silu(dense("gate_proj", self.features)(x)) * dense("up_proj", self.features)(x)
        hidden = constrain(hidden, "batch", *[None] * (hidden.ndim - 2), "mlp")
        return dense("down_proj", x.shape[-1])(hidden)


def rotary(
    angles: Float[Array, "B L half"],
) -> tuple[Float[Array, "B L 1 half"], Float[Array, "B L 1 half"]]:
    """(cos, sin) of rotary angles, computed once for all layers and heads; half is F / 2."""
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: Float[Array, "B L heads F"], rope: Rope) -> Float[Array, "B L heads F"]:
    """Rotary embedding in the half-split form: feature i turns with feature i + F / 2 by angle i.

    With F = 4 and angles (a, b), features (x0, x1, x2, x3) become

        x0 cos a - x2 sin a,  x1 cos b - x3 sin b,  x2 cos a + x0 sin a,  x3 cos b + x1 sin b
    """
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
