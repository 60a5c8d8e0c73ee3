"""The vision tower: patches in padded windows -> visual tokens.

`Qwen2_5_VisionTransformerPretrainedModel` of the reference. Windows are a batch dimension, so a
window layer is plain attention over `[I * W, N]`; a full layer sees `[I, W * N]`. Images never see
each other. Layers come in equal groups (some window layers, then a full one) and run as a scan over
groups.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmrecoder_jax.models.attention import attend
from mmrecoder_jax.models.config import ModelConfig
from mmrecoder_jax.models.layers import Dense, RMSNorm, Rope, SwiGLU, remat, rotate
from mmrecoder_jax.models.sharding import constrain

EPS = 1e-6  # in every norm of the tower, whatever the decoder's is
THETA = 1e4  # base of the rotary frequencies, whatever the decoder's is

Angles = tuple[Float[Array, "I W N half"], Float[Array, "I W N half"]]  # cos and sin; half is F / 2


class VisionAttention(nn.Module):
    """Attention of all heads within each row of a batch of rows."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], rope: Rope, valid: Bool[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        dtypes = self.config.dtype, self.config.param_dtype
        b, length, d = x.shape
        qkv = Dense((3, d), True, *dtypes, name="qkv")(x).reshape(
            b, length, 3, self.config.vision.num_heads, -1
        )
        q, k, v = (constrain(qkv[:, :, i], "batch", "length", "heads", None) for i in range(3))
        # Padding attends to padding: a query without any key is what kernels get wrong.
        segments = valid.astype(jnp.int32)
        y = attend(
            rotate(q, rope), rotate(k, rope), v, segments, segments, None, self.config.attention
        )
        return Dense(d, True, *dtypes, name="proj")(y.reshape(b, length, d))


class VisionBlock(nn.Module):
    """Pre-norm block; `full` attends over the whole image instead of over its windows."""

    config: ModelConfig
    full: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "I W N D"], angles: Angles, valid: Bool[Array, "I W N"]
    ) -> tuple[Float[Array, "I W N D"], None]:
        """One step of the scan over layers: (x, no output per layer)."""
        dtypes = self.config.dtype, self.config.param_dtype
        images, windows, patches, _ = x.shape
        row = (images, windows * patches) if self.full else (images * windows, patches)

        def rows(y: Array) -> Array:  # [I, W, N, ...] -> [I * W, N, ...] or [I, W * N, ...]
            return y.reshape(*row, *y.shape[3:])

        cos, sin = (rows(angle)[:, :, None] for angle in angles)
        y = RMSNorm(EPS, *dtypes, name="norm1")(x)
        y = VisionAttention(self.config, name="attn")(rows(y), (cos, sin), rows(valid))
        x = x + y.reshape(x.shape)
        y = RMSNorm(EPS, *dtypes, name="norm2")(x)
        x = x + SwiGLU(self.config.vision.intermediate_size, True, *dtypes, name="mlp")(y)
        return constrain(x, "batch", None, "length", "embed"), None


class VisionGroup(nn.Module):
    """Window layers, then one full layer.

    Their parameters are `window`, stacked over layers, and `full`.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "I W N D"], angles: Angles, valid: Bool[Array, "I W N"]
    ) -> tuple[Float[Array, "I W N D"], None]:
        """One step of the scan over groups: (x, no output per group)."""
        block = remat(VisionBlock, self.config.remat)
        if layers := self.config.vision.group_layers - 1:
            x, _ = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=layers,
                unroll=min(layers, self.config.scan_unroll),
            )(self.config, False, name="window")(x, angles, valid)
        return block(self.config, True, name="full")(x, angles, valid)


class PatchMerger(nn.Module):
    """Every cell of 2 x 2 patches -> one visual token of the decoder's width.

    The four patches of a cell are neighbours in the order of a window, so a reshape joins them.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "I W N D"]) -> Float[Array, "U decoder"]:
        dtypes = self.config.dtype, self.config.param_dtype
        wide = self.config.vision.merge_patches * x.shape[-1]
        x = RMSNorm(EPS, *dtypes, name="ln_q")(x).reshape(-1, wide)
        x = nn.gelu(Dense(wide, True, *dtypes, name="mlp_0")(x), approximate=False)
        return Dense(self.config.vision.out_hidden_size, True, *dtypes, name="mlp_2")(x)


class PatchEmbed(nn.Module):
    """Projects the pixels of a patch to the width of the tower."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "I W N C"]) -> Float[Array, "I W N D"]:
        return Dense(
            self.config.vision.hidden_size,
            False,
            self.config.dtype,
            self.config.param_dtype,
            name="proj",
        )(x)


class VisionTransformer(nn.Module):
    """The whole tower."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "I W N C"],
        position: Int[Array, "I W N 2"],
        valid: Bool[Array, "I W N"],
    ) -> Float[Array, "U decoder"]:
        """Visual tokens, U = I * W * (N // 4); those of invalid cells are finite and mean nothing.

        Args:
          position: (row, column) of each patch.
        """
        vision = self.config.vision
        x = constrain(
            PatchEmbed(self.config, name="patch_embed")(patches), "batch", None, "length", "embed"
        )
        # the first half of the frequencies turns by the row, the second by the column
        quarter = vision.head_dim // 4
        frequency = THETA ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)
        angles = (position[..., None] * frequency).reshape(*position.shape[:3], 2 * quarter)
        groups = vision.depth // vision.group_layers
        x, _ = nn.scan(
            VisionGroup,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=groups,
            unroll=min(groups, self.config.scan_unroll),
        )(self.config, name="blocks")(x, (jnp.cos(angles), jnp.sin(angles)), valid)
        return PatchMerger(self.config, name="merger")(x)
