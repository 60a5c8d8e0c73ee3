"""The decoder (`Qwen2_5_VLTextModel`): grouped-query attention, multimodal rotary positions.

All layers are one scan: the program is as long as one layer, however many there are.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmrecoder_jax.models.attention import attend
from mmrecoder_jax.models.config import ModelConfig
from mmrecoder_jax.models.layers import Dense, RMSNorm, Rope, SwiGLU, remat, rotary, rotate
from mmrecoder_jax.models.sharding import constrain, matmul, own_rows, take_rows

Cache = dict[str, Float[Array, "layers B K S F"]]  # "k" and "v"
Start = int | Int[Array, ""]


def mrope(positions: Int[Array, "B 3 L"], config: ModelConfig) -> Rope:
    """(cos, sin) of M-RoPE: a frequency turns by the time, row or column position of its section.

    With sections (1, 2, 1) the four frequencies (of F = 8 features) read the axes

        frequency  0     1    2    3
        axis       time  row  row  column
    """
    axis = np.repeat(np.arange(3), config.mrope_section)
    frequency = config.rope_theta ** (
        -jnp.arange(config.head_dim // 2, dtype=jnp.float32) / (config.head_dim // 2)
    )
    return rotary(positions[:, axis].swapaxes(1, 2) * frequency)


class Attention(nn.Module):
    """Causal attention among equal segments, over the tokens or over a cache that holds them."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        cache: Cache | None,
        layer: Int[Array, ""],
        rope: Rope,
        q_segments: Int[Array, "B L"],
        kv_segments: Int[Array, "B S"],
        start: Start,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """(output, cache).

        Args:
          cache: None, or the stacked cache, to whose `layer` the tokens are written first.
          layer: index of this layer in the cache.
          start: the slot of the first token; 0 without a cache.
        """
        c = self.config
        b, length, d = x.shape

        def heads(name: str, count: int) -> Array:
            dense = Dense(count * c.head_dim, True, c.dtype, c.param_dtype, c.lora, name=name)
            y = dense(x).reshape(b, length, count, c.head_dim)
            return constrain(y, "batch", "length", "heads", None)

        q, k, v = (
            rotate(heads("q_proj", c.num_heads), rope),
            rotate(heads("k_proj", c.num_kv_heads), rope),
            heads("v_proj", c.num_kv_heads),
        )
        if cache is not None:
            place = (layer, 0, 0, start, 0)
            cache = {
                name: jax.lax.dynamic_update_slice(
                    cache[name], new.swapaxes(1, 2)[None].astype(cache[name].dtype), place
                )
                for name, new in (("k", k), ("v", v))
            }
            k, v = (
                jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False).astype(c.dtype)
                for name in ("k", "v")
            )
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        # a Python number without a cache: only by one can `choose` tell that a kernel applies
        first = 0 if cache is None else start
        y = attend(q, k, v, q_segments, kv_segments, first, c.attention).reshape(
            b, length, c.num_heads * c.head_dim
        )
        return Dense(d, False, c.dtype, c.param_dtype, c.lora, name="o_proj")(y), cache


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Cache | None],
        layer: Int[Array, ""],
        rope: Rope,
        q_segments: Int[Array, "B L"],
        kv_segments: Int[Array, "B S"],
        start: Start,
    ) -> tuple[tuple[Array, Cache | None], None]:
        """One step of the layer scan: ((hidden `[B, L, D]`, cache), no output per layer)."""

        def whole(y: Array) -> Array:  # matmuls see whole rows, also in the backward pass
            return constrain(y, "batch", "length", "embed")

        x, cache = carry
        c, dtypes = self.config, (self.config.dtype, self.config.param_dtype)
        y = RMSNorm(c.rms_norm_eps, *dtypes, name="input_layernorm")(x)
        y, cache = Attention(c, name="self_attn")(
            whole(y), cache, layer, rope, q_segments, kv_segments, start
        )
        x = x + whole(y)
        y = RMSNorm(c.rms_norm_eps, *dtypes, name="post_attention_layernorm")(x)
        x = x + whole(SwiGLU(c.intermediate_size, False, *dtypes, c.lora, name="mlp")(whole(y)))
        return (constrain(x, "batch", "sequence", "embed"), cache), None


class Table(nn.Module):
    """A `[V, D]` table: token embeddings, the output head, or both when they are tied."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.weight = self.param(
            "weight", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), c.param_dtype
        )

    def lookup(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embeddings of tokens."""
        return take_rows(self.weight, tokens, "/".join((*self.path, "weight")), self.config.dtype)

    def gathered(self) -> Float[Array, "V D"]:
        """The table in the type of compute; every device has whole rows."""
        return constrain(self.weight.astype(self.config.dtype), "vocab", None)

    def logits(
        self, hidden: Float[Array, "... D"], weight: Float[Array, "V D"] | None = None
    ) -> Float[Array, "... V"]:
        """float32 scores of all rows.

        Args:
          weight: `gathered()`, if the caller has it already.
        """
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(self.config.dtype)
        if weight is None:
            y = matmul(
                flat,
                self.weight.astype(self.config.dtype),
                "/".join((*self.path, "weight")),
                1,
                jnp.float32,
            )
        else:
            y = jnp.einsum("nd,vd->nv", flat, weight, preferred_element_type=jnp.float32)
        y = y.reshape(*hidden.shape[:-1], -1)
        return constrain(y, "batch", *[None] * (y.ndim - 2), "vocab")


class Decoder(nn.Module):
    """Embeddings (or visual tokens in their places), layers, final norm."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Table(c)
        self.layers = nn.scan(
            remat(DecoderLayer, c.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * 4),
            length=c.num_layers,
            unroll=min(c.num_layers, c.scan_unroll),
        )(c)
        self.norm = RMSNorm(c.rms_norm_eps, c.dtype, c.param_dtype)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B 3 L"],
        vision_index: Int[Array, "B L"] | None,
        vision_features: Float[Array, "U D"] | None,
        cache: Cache | None,
        q_segments: Int[Array, "B L"],
        kv_segments: Int[Array, "B S"],
        start: Start,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """(hidden states after the final norm, cache); see `Qwen25VL` for the arguments."""
        x = self.embed_tokens.lookup(tokens)
        if vision_features is not None:
            assert vision_index is not None, "visual tokens need places"
            visual = own_rows(vision_features, jnp.maximum(vision_index, 0)).astype(x.dtype)
            x = jnp.where(vision_index[..., None] >= 0, visual, x)
        x = constrain(x, "batch", "sequence", "embed")
        layers = jnp.arange(self.config.num_layers)
        (x, cache), _ = self.layers(
            (x, cache), layers, mrope(positions, self.config), q_segments, kv_segments, start
        )
        return self.norm(x), cache
