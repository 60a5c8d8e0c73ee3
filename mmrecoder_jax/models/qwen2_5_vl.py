"""Qwen2.5-VL: what training and sampling call.

Parameters are a plain nested dict, named as published, with layers stacked on axis 0.

    params = init_params(config, jax.random.key(0))
    apply = functools.partial(Qwen25VL(config).apply, {"params": params})
    features = apply(patches, position, valid, method="encode_images")
    hidden = apply(tokens, positions, segment_ids, vision_index, features)
    logits = apply(hidden, method="logits")
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmrecoder_jax.models.config import MEAN, STD, ModelConfig
from mmrecoder_jax.models.language import Decoder, KeysValues, RowLayout, Table
from mmrecoder_jax.models.vision import VisionTransformer

# Share of its random size that a patch of blank paper has at first (`init_params`).
WHITE = 0.5


class Qwen25VL(nn.Module):
    """The vision tower and the decoder over one set of parameters.

    Public methods are called through `apply(..., method=...)`.
    """

    config: ModelConfig

    def setup(self) -> None:
        self.visual = VisionTransformer(self.config)
        self.model = Decoder(self.config)
        if not self.config.tie_word_embeddings:
            self.lm_head = Table(self.config)

    def encode_images(
        self,
        patches: Float[Array, "I W N C"],
        position: Int[Array, "I W N 2"],
        valid: Bool[Array, "I W N"],
    ) -> Float[Array, "U D"]:
        """Images (see `processor.ImagePatches`) -> visual tokens in window order.

        There are U = I * W * (N // 4) of them. Cell c of image i is in row
        i * W * (N // 4) + slots[c]. Rows of padding are finite and mean nothing.
        """
        return self.visual(patches, position, valid)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B 3 L"],
        segment_ids: Int[Array, "B L"],
        vision_index: Int[Array, "B L"],
        vision_features: Float[Array, "U D"] | None,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the final norm, for training.

        Args:
          positions: M-RoPE positions (time, row, column).
          segment_ids: attention is causal among tokens of one segment; 0 is padding.
          vision_index: where not negative, the row of `vision_features` that replaces the token's
            embedding. On a mesh both are cut over the batch axes, and the index counts within the
            device's own part (`data.batching`).
        """
        return self.model(
            tokens, positions, vision_index, vision_features, None, segment_ids, segment_ids
        )[0]

    def packed(
        self,
        tokens: Int[Array, "P T"],
        positions: Int[Array, "P 3 T"],
        vision_index: Int[Array, "P T"],
        vision_features: Float[Array, "U D"] | None,
        layout: RowLayout,
    ) -> Float[Array, "P T D"]:
        """As `__call__`, for tokens of which each stands once, however many rows have it.

        Args:
          tokens: P parts of T, each of a device of the batch axes, or of several.
          layout: the rows; attention is causal in each. Padding tokens have finite hidden states
            that mean nothing.
        """
        segments = (layout.rows >= 0).astype(jnp.int32)
        return self.model(
            *(tokens, positions, vision_index, vision_features, None),
            *(segments, segments, layout),
        )[0]

    def extend(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B 3 L"],
        vision_index: Int[Array, "B L"],
        vision_features: Float[Array, "U D"] | None,
        lengths: Int[Array, " B"],
        past: KeysValues,
        past_valid: Bool[Array, "B slots"],
    ) -> tuple[Float[Array, "B L D"], KeysValues]:
        """What follows in conversations: a prompt (of nothing yet), or feedback.

        Args:
          lengths: real tokens of a row; the rest is padding.
          past: keys and values before, `[layers, B, K, slots, F]`; may have no slots.
          past_valid: slots of `past` that hold something.

        Returns:
          (hidden states after the final norm, keys and values `[layers, B, K, L, F]` of the
          tokens).
        """
        shown = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
        if past_valid.shape[1]:
            q_segments, before = jnp.ones_like(shown), past_valid.astype(jnp.int32)
            kv_segments = jnp.concatenate([before, shown], axis=1)
        else:  # padding is a segment of its own: kernels apply
            q_segments = kv_segments = shown
        hidden, own = self.model(
            tokens, positions, vision_index, vision_features, past, q_segments, kv_segments
        )
        assert own is not None  # as a past came in
        return hidden, own

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embeddings of text, as they enter the first layer."""
        return self.model.embed(tokens, None, None)

    def finish(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The final norm of what leaves the last layer."""
        return self.model.finish(x)

    def logits(
        self, hidden: Float[Array, "... D"], head: Float[Array, "V D"] | None = None
    ) -> Float[Array, "... V"]:
        """float32 scores of every vocabulary row, also of rows beyond the tokenizer's vocabulary.

        A loop over chunks takes `head()` before the loop and passes it here. Otherwise every turn
        of the loop gathers the table and reduces its gradient over the devices.
        """
        return self._head().logits(hidden, head)

    def head(self) -> Float[Array, "V D"]:
        """The output table in the type of compute, gathered over `fsdp`."""
        return self._head().gathered()

    def _head(self) -> Table:
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def _everything(
        self, patches: Array, position: Array, valid: Array, tokens: Array, positions: Array
    ) -> Array:
        """Touches every parameter, for `init`."""
        features = self.encode_images(patches, position, valid)
        return self.logits(self(tokens, positions, tokens, tokens, features))


def visual_tokens(model: Qwen25VL, params: dict, batch: dict[str, Array]) -> Float[Array, "U D"]:
    """What `vision_index` points at: the images of a batch, encoded here or before.

    Args:
      batch: holds `patches`, `patch_positions` and `patch_valid` (`batching.pad_images`), or
        `features` `[I, W * (N // 4), D]` (`vision_features.FrozenTower`).
    """
    if "features" in batch:
        return batch["features"].reshape(-1, batch["features"].shape[-1])
    images = batch["patches"], batch["patch_positions"], batch["patch_valid"]
    features = model.apply({"params": params}, *images, method=Qwen25VL.encode_images)
    assert isinstance(features, jax.Array)  # without `mutable`, flax returns the output alone
    return features


def no_past(config: ModelConfig, rows: int) -> tuple[KeysValues, Bool[Array, "B 0"]]:
    """`past` and `past_valid` of `Qwen25VL.extend` where a conversation begins."""
    shape = (config.num_layers, rows, config.num_kv_heads, 0, config.head_dim)
    return {name: jnp.zeros(shape, config.dtype) for name in ("k", "v")}, jnp.zeros((rows, 0), bool)


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, rng: jax.Array) -> dict:
    """Random parameters to train from scratch.

    Norms are one, biases zero, kernels normal with variance 1 / fan-in, with three exceptions that
    together let the tiny preset learn colours in half the steps:

    - Tables have deviation 0.16, so that a token can still be told in the residual stream after a
      few layers.
    - What a layer adds to the stream is damped to 0.3.
    - A patch of blank paper is `WHITE` of what it would be, so about as large as one that is drawn
      on: most of a chart is white. It must not become zero, because a norm divides by its size: the
      first gradients would be rounding errors, a million times larger than all others.

    To create them sharded, call this inside `jax.jit(..., out_shardings=param_shardings(...))`; for
    shapes alone, inside `jax.eval_shape`.
    """
    vision = config.vision
    patches = jnp.zeros((1, 1, vision.window_patches, vision.patch_dim))
    position = jnp.zeros((1, 1, vision.window_patches, 2), jnp.int32)
    tokens = jnp.zeros((1, 1), jnp.int32)
    arguments = (
        patches,
        position,
        jnp.ones(patches.shape[:3], bool),
        tokens,
        jnp.zeros((1, 3, 1), jnp.int32),
    )
    params = Qwen25VL(config).init(rng, *arguments, method="_everything")["params"]
    # a white patch after normalisation, channel by channel as patches are
    white = jnp.repeat((1.0 - jnp.array(MEAN)) / jnp.array(STD), vision.patch_size**2)
    white = white / jnp.linalg.norm(white)

    def start(path: tuple[Any, ...], x: Array) -> Array:
        name = "/".join(key.key for key in path)
        if name.endswith(("embed_tokens/weight", "lm_head/weight")):
            return x * 8.0
        if name.endswith(("down_proj/kernel", "o_proj/kernel", "attn/proj/kernel")):
            return x * 0.3
        if name.endswith("patch_embed/proj/kernel"):
            along = jnp.outer(white, white @ x.astype(jnp.float32))
            return x - ((1.0 - WHITE) * along).astype(x.dtype)
        return x

    return jax.tree_util.tree_map_with_path(start, params)
