"""The decoder (`Qwen2_5_VLTextModel`): grouped-query attention, multimodal rotary positions.

All layers are one scan: the program is as long as one layer, however many there are.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmrecoder_jax.models.attention import attend
from mmrecoder_jax.models.config import ModelConfig
from mmrecoder_jax.models.layers import Dense, RMSNorm, Rope, SwiGLU, remat, rotary, rotate
from mmrecoder_jax.models.sharding import constrain, matmul, own_rows, take_rows

# "k" and "v", heads before slots: `[K, slots, F]` behind rows and, where they are stacked, layers
KeysValues = dict[str, Float[Array, "... _ _ F"]]
# What a layer's queries look at: (queries, keys and values of its tokens) -> (means of values, what
# the caller keeps of the layer).
Look = Callable[
    [Float[Array, "B L H F"], Float[Array, "B L K F"], Float[Array, "B L K F"]],
    tuple[Float[Array, "B L H F"], Any],
]


class RowLayout(flax.struct.PyTreeNode):
    """Which tokens attention sees as rows (`data.batching`); all numbers count within a device's
    part, and -1 is padding.

    Attributes:
      rows: slots of the tokens of each row.
      home: where in `rows` (row * L + place) a token's output is taken from.
    """

    rows: Int[Array, "B L"]
    home: Int[Array, "P T"]

    def gathered(self, x: Float[Array, "P T heads F"]) -> Float[Array, "B L heads F"]:
        """Rows of what belongs to tokens; padding is zero."""
        y = own_rows(x.reshape(-1, *x.shape[2:]), self.rows)
        return constrain(y, "batch", "length", "heads", None)

    def given_back(self, y: Float[Array, "B L heads F"]) -> Float[Array, "P T heads F"]:
        """What rows have found, for each token once; zero for padding."""
        x = own_rows(y.reshape(-1, *y.shape[2:]), self.home)
        return constrain(x, "batch", "length", "heads", None)


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
    """Projections, rotary positions, and what `look` makes of them."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config

        def dense(features: int, bias: bool) -> Dense:
            return Dense(features, bias, c.dtype, c.param_dtype, c.lora)

        self.q_proj = dense(c.num_heads * c.head_dim, True)
        self.k_proj = dense(c.num_kv_heads * c.head_dim, True)
        self.v_proj = dense(c.num_kv_heads * c.head_dim, True)
        self.o_proj = dense(c.hidden_size, False)

    def __call__(
        self, x: Float[Array, "B L D"], rope: Rope, look: Look
    ) -> tuple[Float[Array, "B L D"], Any]:
        """(output, what `look` keeps)."""
        b, length, _ = x.shape
        c = self.config

        def heads(projected: Array, count: int) -> Array:
            y = projected.reshape(b, length, count, c.head_dim)
            return constrain(y, "batch", "length", "heads", None)

        y, kept = look(
            rotate(heads(self.q_proj(x), c.num_heads), rope),
            rotate(heads(self.k_proj(x), c.num_kv_heads), rope),
            heads(self.v_proj(x), c.num_kv_heads),
        )
        return self.o_proj(y.reshape(b, length, c.num_heads * c.head_dim)), kept


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    config: ModelConfig

    def setup(self) -> None:
        c, dtypes = self.config, (self.config.dtype, self.config.param_dtype)
        self.input_layernorm = RMSNorm(c.rms_norm_eps, *dtypes)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.rms_norm_eps, *dtypes)
        self.mlp = SwiGLU(c.intermediate_size, False, *dtypes, c.lora)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        past: KeysValues | None,
        rope: Rope,
        q_segments: Int[Array, "rows _"],
        kv_segments: Int[Array, "rows S"],
        layout: RowLayout | None = None,
    ) -> tuple[Float[Array, "B L D"], KeysValues | None]:
        """One step of the layer scan: (hidden, keys and values of the tokens if `past` is given).

        Args:
          past: keys and values before the tokens, `[B, K, slots, F]`; None in training. Segments
            of keys are those of its slots, then those of the tokens.
          layout: where attention finds its rows; segments are theirs then. None: the tokens are
            rows.
        """
        kernel = self.config.attention

        def look(q: Array, k: Array, v: Array) -> tuple[Array, KeysValues | None]:
            # 0, a Python number: only by one can `choose` tell that a kernel applies
            if past is None and layout is not None:
                q, k, v = (layout.gathered(x) for x in (q, k, v))
                y = attend(q, k, v, q_segments, kv_segments, 0, kernel)
                return layout.given_back(y), None
            if past is None:
                return attend(q, k, v, q_segments, kv_segments, 0, kernel), None
            own = {"k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)}
            slots = past["k"].shape[2]
            if slots:
                k, v = (
                    jnp.concatenate([past[name].swapaxes(1, 2).astype(x.dtype), x], axis=1)
                    for name, x in (("k", k), ("v", v))
                )
            return attend(q, k, v, q_segments, kv_segments, slots, kernel), own

        return self.with_look(x, rope, look)

    def with_look(
        self, x: Float[Array, "B L D"], rope: Rope, look: Look
    ) -> tuple[Float[Array, "B L D"], Any]:
        """(hidden, what `look` keeps) of the layer, whatever its queries look at."""

        def whole(y: Array) -> Array:  # matmuls see whole rows, also in the backward pass
            return constrain(y, "batch", "length", "embed")

        y, kept = self.self_attn(whole(self.input_layernorm(x)), rope, look)
        x = x + whole(y)
        x = x + whole(self.mlp(whole(self.post_attention_layernorm(x))))
        return constrain(x, "batch", "sequence", "embed"), kept


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

    def embed(
        self,
        tokens: Int[Array, "B L"],
        vision_index: Int[Array, "B L"] | None,
        vision_features: Float[Array, "U D"] | None,
    ) -> Float[Array, "B L D"]:
        """What enters the first layer."""
        x = self.embed_tokens.lookup(tokens)
        if vision_features is not None:
            assert vision_index is not None, "visual tokens need places"
            visual = own_rows(vision_features, vision_index).astype(x.dtype)
            x = jnp.where(vision_index[..., None] >= 0, visual, x)
        return constrain(x, "batch", "sequence", "embed")

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B 3 L"],
        vision_index: Int[Array, "B L"] | None,
        vision_features: Float[Array, "U D"] | None,
        past: KeysValues | None,
        q_segments: Int[Array, "rows _"],
        kv_segments: Int[Array, "rows S"],
        layout: RowLayout | None = None,
    ) -> tuple[Float[Array, "B L D"], KeysValues | None]:
        """(hidden states after the final norm, keys and values by layer where `past` is given)."""
        x = self.embed(tokens, vision_index, vision_features)
        rope = mrope(positions, self.config)
        x, own = self.layers(x, past, rope, q_segments, kv_segments, layout)
        return self.norm(x), own

    def finish(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The final norm of what leaves the last layer."""
        return self.norm(x)
