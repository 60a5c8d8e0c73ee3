"""A vision tower that is not trained: each image is encoded once.

Its features serve both turns, the whole group and the update. They stay on the host, as patches do,
in the compute type (for the published sizes a sixth of the patches' bytes). They live as long as
their image: the processor gives equal bytes the same `ImagePatches`, and trajectories hold theirs
until the learner has seen them.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmrecoder_jax.data.batching import VisionLayout, bucket, pad_images
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.processor import ImagePatches
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL
from mmrecoder_jax.models.sharding import batch_sharding

AT_ONCE = 8  # images that a host encodes per call, if the mesh does not ask for more


class FrozenTower:
    """Features of images, from one set of tower parameters.

    Args:
      windows: buckets for the windows of an image (`data.windows`).

    Attributes:
      encoded: how many images the tower has encoded so far.
    """

    def __init__(self, model: Qwen25VL, mesh: Mesh, layout: VisionLayout, windows: tuple[int, ...]):
        self.model, self.mesh, self.layout, self.windows = model, mesh, layout, windows
        self.encoded = 0
        self._features: weakref.WeakKeyDictionary[ImagePatches, np.ndarray] = (
            weakref.WeakKeyDictionary()
        )
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        share = -(-ways // jax.process_count())
        self._count = -(-AT_ONCE // share) * share

        def encode(visual: Any, arrays: tuple[jax.Array, ...]) -> jax.Array:
            rows = model.apply(
                {"params": {"visual": visual}}, *arrays, method=Qwen25VL.encode_images
            )
            assert isinstance(rows, jax.Array)  # without `mutable`, flax returns the output alone
            return rows.reshape(arrays[0].shape[0], -1, rows.shape[-1])

        self._encode = jax.jit(encode, out_shardings=batch_sharding(mesh))

    def encode(self, params: Any, images: Sequence[ImagePatches]) -> None:
        """Encodes those of `images` that are not encoded yet.

        All hosts call this together; each passes its own images.
        """
        missing = [image for image in dict.fromkeys(images) if image not in self._features]
        most, windows = distributed.global_max(
            np.array([len(missing), max((len(image.valid) for image in missing), default=0)])
        )
        windows = bucket(int(windows), self.windows, "an image's windows (data.windows)")
        for start in range(0, int(most), self._count):
            part = missing[start : start + self._count]
            arrays = distributed.to_global(
                tuple(pad_images(part, self._count, windows, self.layout).values()), self.mesh
            )
            with jax.set_mesh(self.mesh):
                features = distributed.to_host(self._encode(params["visual"], arrays))
            for image, rows in zip(part, features, strict=False):
                self._features[image] = np.array(rows[: self.layout.merged(len(image.valid))])
            self.encoded += len(part)

    def arrays(
        self, images: Sequence[ImagePatches | None], count: int, windows: int, layout: VisionLayout
    ) -> dict[str, np.ndarray]:
        """`{"features": [I, W * (N // 4), D]}` of encoded images, instead of `pad_images`' arrays.

        Args:
          count: I; the rest of the images is padding.
          windows: W.

        Raises:
          KeyError: `encode` has not seen an image.
        """
        width = self.model.config.hidden_size
        features = np.zeros(
            (count, layout.merged(windows), width), jax.numpy.dtype(self.model.config.dtype)
        )
        for i, image in enumerate(images):
            if image is not None:
                rows = self._features[image]
                features[i, : len(rows)] = rows
        return {"features": features}
