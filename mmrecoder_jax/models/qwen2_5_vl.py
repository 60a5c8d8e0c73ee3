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
from mmrecoder_jax.models.language import Cache, Decoder, Table
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
            tokens, positions, vision_index, vision_features, None, segment_ids, segment_ids, 0
        )[0]

    def extend(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B 3 L"],
        vision_index: Int[Array, "B L"] | None,
        vision_features: Float[Array, "U D"] | None,
        cache: Cache,
        cache_start: int | Int[Array, ""],
        valid: Bool[Array, "B S"],
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Writes tokens to the cache: a prompt, one step of decoding, or the next turn's prompt.

        Args:
          vision_index, vision_features: see `__call__`; None without images.
          cache: is donated by the caller, or it is copied.
          cache_start: the slot of the first token.
          valid: query i of row b sees the slots s <= cache_start + i with valid[b, s]; the slots
            being written are covered too.

        Returns:
          (hidden states after the final norm, the cache).
        """
        start = jnp.asarray(cache_start, jnp.int32)
        seen = jnp.ones(tokens.shape, jnp.int32)
        hidden, written = self.model(
            tokens,
            positions,
            vision_index,
            vision_features,
            cache,
            seen,
            valid.astype(jnp.int32),
            start,
        )
        assert written is not None  # as a cache came in
        return hidden, written

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


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty key-value cache of `slots` tokens per row, in the type of compute.

    Heads before slots is how a TPU reads them; the other order costs it a second copy of the cache.
    """
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    return {name: jnp.zeros(shape, config.dtype) for name in ("k", "v")}


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
