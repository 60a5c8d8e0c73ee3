"""The vision tower: patches in padded windows -> visual tokens
(`Qwen2_5_VisionTransformerPretrainedModel`).

Windows are a batch dimension, so a window layer is plain attention over [I * W, S]; a full layer
sees [I, W * S]. Images never see each other. Layers come in equal groups, some window layers and
then a full one, and run as a scan over groups.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmrecoder_jax.models.attention import attend
from mmrecoder_jax.models.config import ModelConfig
from mmrecoder_jax.models.layers import Dense, RMSNorm, SwiGLU, remat, rotate
from mmrecoder_jax.models.sharding import constrain

EPS = 1e-6  # of every norm in the tower, whatever the decoder's is
THETA = 1e4


class VisionAttention(nn.Module):
    """Attention of all heads within each row of a batch of rows."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], rope, valid: Bool[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        dtypes = self.config.dtype, self.config.param_dtype
        b, length, d = x.shape
        qkv = Dense((3, d), True, *dtypes, name="qkv")(x).reshape(
            b, length, 3, self.config.vision.num_heads, -1
        )
        q, k, v = (constrain(qkv[:, :, i], "batch", "length", "heads", None) for i in range(3))
        seen = jnp.ones((b, length), jnp.int32)
        y = attend(
            rotate(q, rope),
            rotate(k, rope),
            v,
            seen,
            valid.astype(jnp.int32),
            None,
            self.config.attention,
        )
        return Dense(d, True, *dtypes, name="proj")(y.reshape(b, length, d))


class VisionBlock(nn.Module):
    """Pre-norm block; `full` attends over the whole image instead of over its windows."""

    config: ModelConfig
    full: bool

    @nn.compact
    def __call__(self, x: Float[Array, "I W S D"], rope, valid: Bool[Array, "I W S"]):
        dtypes = self.config.dtype, self.config.param_dtype
        images, windows, patches, _ = x.shape
        row = (images, windows * patches) if self.full else (images * windows, patches)

        def rows(y):
            return y.reshape(*row, *y.shape[3:])

        y = RMSNorm(EPS, *dtypes, name="norm1")(x)
        y = VisionAttention(self.config, name="attn")(
            rows(y), tuple(rows(angle)[:, :, None] for angle in rope), rows(valid)
        )
        x = x + y.reshape(x.shape)
        y = RMSNorm(EPS, *dtypes, name="norm2")(x)
        x = x + SwiGLU(self.config.vision.intermediate_size, True, *dtypes, name="mlp")(y)
        return constrain(x, "batch", None, "length", "embed"), None


class VisionGroup(nn.Module):
    """Window layers, then one full layer; their parameters are stacked as `window` [layers, ...]
    and `full`.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "I W S D"], rope, valid: Bool[Array, "I W S"]):
        block = remat(VisionBlock, self.config.remat)
        if layers := self.config.vision.group_layers - 1:
            x, _ = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=layers,
                unroll=min(layers, self.config.scan_unroll),
            )(self.config, False, name="window")(x, rope, valid)
        return block(self.config, True, name="full")(x, rope, valid)


class PatchMerger(nn.Module):
    """Every 2 x 2 cell of patches -> one visual token of the decoder's width."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "I W S D"]) -> Float[Array, "M E"]:
        dtypes = self.config.dtype, self.config.param_dtype
        wide = self.config.vision.merge_patches * x.shape[-1]
        x = RMSNorm(EPS, *dtypes, name="ln_q")(x).reshape(-1, wide)
        x = nn.gelu(Dense(wide, True, *dtypes, name="mlp_0")(x), approximate=False)
        return Dense(self.config.vision.out_hidden_size, True, *dtypes, name="mlp_2")(x)


class PatchEmbed(nn.Module):
    """Pixels of a patch -> width of the tower."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "I W S C"]) -> Float[Array, "I W S D"]:
        return Dense(
            self.config.vision.hidden_size,
            False,
            self.config.dtype,
            self.config.param_dtype,
            name="proj",
        )(x)


class VisionTransformer(nn.Module):
    """The tower as a whole."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "I W S C"],
        position: Int[Array, "I W S 2"],
        valid: Bool[Array, "I W S"],
    ) -> Float[Array, "M E"]:
        """Visual tokens, flattened [I * W * (S // 4), E]; those of invalid cells are finite and
        mean nothing.
        """
        vision = self.config.vision
        x = constrain(
            PatchEmbed(self.config, name="patch_embed")(patches), "batch", None, "length", "embed"
        )
        # half of the rotated pairs turn by the row, half by the column
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
