"""Qwen2.5-VL: what training and sampling call. Parameters are a plain nested dict, layers stacked
on axis 0, named as published.

params = init_params(config, jax.random.key(0))
apply = functools.partial(Qwen25VL(config).apply, {"params": params})
features = apply(patches, position, valid, method="encode_images")
hidden = apply(tokens, positions, segment_ids, vision_index, features)
logits = apply(hidden, method="logits")
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmrecoder_jax.models.config import ModelConfig
from mmrecoder_jax.models.language import Decoder, Table
from mmrecoder_jax.models.processor import MEAN, STD
from mmrecoder_jax.models.vision import VisionTransformer

Cache = dict[str, Float[Array, "layers B K S F"]]


class Qwen25VL(nn.Module):
    """The vision tower and the decoder over one set of parameters; every public method is for
    `apply(..., method=...)`.
    """

    config: ModelConfig

    def setup(self):
        self.visual = VisionTransformer(self.config)
        self.model = Decoder(self.config)
        if not self.config.tie_word_embeddings:
            self.lm_head = Table(self.config)

    def encode_images(
        self,
        patches: Float[Array, "I W S C"],
        position: Int[Array, "I W S 2"],
        valid: Bool[Array, "I W S"],
    ) -> Float[Array, "M D"]:
        """Images (see `processor.ImagePatches`) -> visual tokens [I * W * (S // 4), D] in window
        order.

        Cell c of image i lies in row i * W * (S // 4) + slots[c]. Rows of padding are finite and
        mean nothing.
        """
        return self.visual(patches, position, valid)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B 3 L"],
        segment_ids: Int[Array, "B L"],
        vision_index: Int[Array, "B L"],
        vision_features: Float[Array, "M D"] | None,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the final norm, for training: causal attention among equal
        `segment_ids`, 0 = padding.

        Where `vision_index` is not negative, that row of `vision_features` stands in place of the
        token's embedding. On a mesh both are cut over the batch axes, and the index counts within
        the device's own part (`data.batching`).
        """
        return self.model(
            tokens, positions, vision_index, vision_features, None, segment_ids, segment_ids, 0
        )[0]

    def extend(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B 3 L"],
        vision_index: Int[Array, "B L"],
        vision_features: Float[Array, "M D"] | None,
        cache: Cache,
        cache_start: Int[Array, ""],
        valid: Bool[Array, "B S"],
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Writes tokens to slots cache_start .. cache_start + L of the cache: prefill, one step of
        decoding, or the next turn's prompt.

        Query i of row b sees the slots s <= cache_start + i with valid[b, s]; `valid` covers the
        slots being written too. Returns (hidden [B, L, D] after the final norm, the cache). Donate
        the cache, or it is copied.
        """
        start = jnp.asarray(cache_start, jnp.int32)
        seen = jnp.ones(tokens.shape, jnp.int32)
        return self.model(
            tokens,
            positions,
            vision_index,
            vision_features,
            cache,
            seen,
            valid.astype(jnp.int32),
            start,
        )

    def logits(
        self, hidden: Float[Array, "... D"], head: Float[Array, "V D"] | None = None
    ) -> Float[Array, "... V"]:
        """float32 scores of every vocabulary row, the undecodable ones behind the tokenizer's end
        included.

        A loop over chunks takes `head` outside of it, or every turn gathers the table and reduces
        its gradient over the devices.
        """
        return self._head().logits(hidden, head)

    def head(self) -> Float[Array, "V D"]:
        """The output table in the type of compute, gathered over `fsdp`."""
        return self._head().gathered()

    def _head(self) -> Table:
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def _everything(self, patches, position, valid, tokens, positions):
        features = self.encode_images(patches, position, valid)
        return self.logits(self(tokens, positions, tokens, tokens, features))


def visual_tokens(model: Qwen25VL, params: dict, batch: dict[str, Array]) -> Float[Array, "M D"]:
    """What `vision_index` points at: the images of a batch, encoded here, or taken as they are
    where they come encoded.

    `batch` holds `patches`, `patch_positions`, `patch_valid` (`batching.pad_images`), or `features`
    [I, W * (S // 4), D] (`FrozenTower`).
    """
    if "features" in batch:
        return batch["features"].reshape(-1, batch["features"].shape[-1])
    images = batch["patches"], batch["patch_positions"], batch["patch_valid"]
    return model.apply({"params": params}, *images, method=Qwen25VL.encode_images)


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: str | None = None) -> Cache:
    """An empty key-value cache of `slots` tokens a row: {"k", "v"} [layers, B, K, S, F] in `dtype`
    (the config's when None).

    Heads before slots is how a TPU reads them; the other order costs it a second copy of the cache.
    """
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    return {name: jnp.zeros(shape, dtype or config.dtype) for name in ("k", "v")}


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, rng: jax.Array) -> dict:
    """Random parameters to train from: norms one, biases zero, kernels normal with variance 1 /
    fan-in but for three choices.

    Tables have deviation 0.16, so that a token can still be told in the residual stream after a few
    layers. What a layer adds to the stream is damped to 0.3. A patch of blank paper maps to zero:
    most of a chart is white, and would drown what is drawn. Together they let the tiny preset learn
    colours in half the steps.

    To create them sharded, call it inside `jax.jit(..., out_shardings=param_shardings(...))`; for
    shapes alone, `jax.eval_shape`.
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
    # channel-major, as patches are
    white = jnp.repeat((1.0 - jnp.array(MEAN)) / jnp.array(STD), vision.patch_size**2)
    white = white / jnp.linalg.norm(white)

    def start(path, x):
        name = "/".join(key.key for key in path)
        if name.endswith(("embed_tokens/weight", "lm_head/weight")):
            return x * 8.0
        if name.endswith(("down_proj/kernel", "o_proj/kernel", "attn/proj/kernel")):
            return x * 0.3
        if name.endswith("patch_embed/proj/kernel"):
            return x - jnp.outer(white, white @ x.astype(jnp.float32)).astype(x.dtype)
        return x

    return jax.tree_util.tree_map_with_path(start, params)
