"""The programs that a stage runs, on devices that this machine need not have: lowered for shapes
alone, and their flops counted.

They are the very programs of `rl.sampler` and `train_state.Update`, at the configuration's largest
buckets.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mmrecoder_jax import grpo, sft
from mmrecoder_jax.config import ConfigError, model_config
from mmrecoder_jax.data.batching import BatchShape, VisionLayout, micro_batch, pad_images
from mmrecoder_jax.learner.update import Update, abstract_state, make_optimizer
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params
from mmrecoder_jax.models.sharding import batch_sharding, make_mesh, param_shardings
from mmrecoder_jax.rl.learner_batch import learner_shape
from mmrecoder_jax.rl.sampler import Sampler, SamplerSpec, state_shardings
from mmrecoder_jax.rl.trajectory import MODES, Mode
from mmrecoder_jax.stage import Stage, vision_layout


class Programs:
    """The stage's programs on the devices of a slice, for shapes alone.

    `rows` of a rollout are `rl.rollout_prompts` prompts (all of them where it is 0) times G; an
    update runs `train.batch_size * G` rows in micro-batches. Rows and windows are the largest
    buckets of the configuration.
    """

    def __init__(self, config: ConfigDict, devices: list[Any]):
        sizes = model_config(config)
        self.config, self.sizes = config, sizes
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
        layout = vision_layout(sizes, sizes.vocab_size - 2, sizes.vocab_size - 1, self.mesh)
        self.stage = Stage(
            config, "", self.mesh, None, None, Qwen25VL(sizes), layout, (sizes.vocab_size - 2,)
        )
        abstract = jax.eval_shape(lambda: init_params(sizes, jax.random.key(0)))
        self.params = _place(abstract, param_shardings(abstract, self.mesh))
        self.tx, self.schedule = make_optimizer(config.optim, 1000)
        self.state = abstract_state(self.params, self.tx, self.mesh, self.stage.trained)
        self.windows = max(config.data.windows)
        self.hosts = len({device.process_index for device in devices})
        cut = {"train.micro_batch_size": config.train.micro_batch_size}
        if config.stage in MODES:
            field = "rl.rollout_prompts" if config.rl.rollout_prompts else "train.batch_size"
            cut[field] = config.rl.rollout_prompts or config.train.batch_size
        for field, rows in cut.items():
            if rows % self.ways:
                raise ConfigError(
                    f"{field}={rows} rows cannot be split over data*fsdp={self.ways} devices: choose a multiple, or cut the model "
                    f"further (--config.mesh.tensor={2 * config.mesh.tensor})"
                )

    @property
    def ways(self) -> int:
        """Devices that the rows of a batch are cut over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @functools.cached_property
    def shape(self) -> BatchShape:
        """Of a micro-batch of all hosts together."""
        if self.config.stage in MODES:
            part = learner_shape(
                self.config, self.stage.layout, MODES[self.config.stage], self.hosts
            )
        else:
            part = sft.sft_shape(
                self.config,
                self.stage.layout,
                self.config.stage == "sft_self_correction",
                self.hosts,
            )
        return dataclasses.replace(
            part, rows=part.rows * self.hosts, images=part.images * self.hosts
        )

    @property
    def micro_batches(self) -> int:
        """Of an update."""
        rows = self.config.train.batch_size * (
            self.config.rl.group if self.config.stage in MODES else 1
        )
        return rows // self.shape.rows

    def micro_batch(self) -> dict[str, Any]:
        """One of an update's micro-batches."""
        arrays = micro_batch(
            [],
            [],
            self.shape,
            max(self.shape.lengths),
            self.windows,
            self.stage.layout,
            self.image_arrays,
        )
        return self._by_row(arrays)

    @property
    def encodes_images(self) -> bool:
        """Whether the tower runs inside the programs; in RL a frozen one has run before."""
        return self.config.stage not in MODES or self.stage.trained("visual/")

    def reads(self, program: str, name: str) -> bool:
        """Whether a program reads the parameter of that name. XLA drops the others from its
        arguments; they lie beside it.
        """
        if program == "update" and self.micro_batches > 1:
            return self.stage.trained(name)
        return not name.startswith("visual/") or (self.encodes_images and program != "decode")

    def image_arrays(
        self, images: Any, count: int, windows: int, layout: VisionLayout
    ) -> dict[str, np.ndarray]:
        """Patches, or in RL what a frozen tower made of them."""
        if self.encodes_images:
            return pad_images(images, count, windows, layout)
        return {
            "features": np.zeros(
                (count, layout.merged(windows), self.sizes.hidden_size),
                jax.numpy.dtype(self.sizes.dtype),
            )
        }

    def _by_row(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        where = batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
            for name, x in arrays.items()
        }

    @functools.cached_property
    def _update(self) -> Update:
        loss = (
            grpo.make_loss(self.stage) if self.config.stage in MODES else sft.make_loss(self.stage)
        )
        return Update(loss, self.tx, self.schedule, self.mesh, self.stage.trained)

    def gradients(self) -> jax.stages.Lowered:
        return self._update.lower("gradients", self.state, self.micro_batch())

    def update(self) -> jax.stages.Lowered:
        return self._update.lower(
            "whole" if self.micro_batches == 1 else "step", self.state, self.micro_batch()
        )

    def prompts(self, rows: int, length: int) -> dict[str, Any]:
        """What `Sampler.prefill` and `Sampler.extend` take: a piece and an image a row."""
        rows_only = {
            "tokens": (rows, length),
            "vision_index": (rows, length),
            "positions": (rows, 3, length),
            "lengths": (rows,),
        }
        arrays = {name: np.zeros(shape, np.int32) for name, shape in rows_only.items()}
        return self._by_row(arrays | self.image_arrays([], rows, self.windows, self.stage.layout))

    @functools.cached_property
    def sampler(self) -> Sampler:
        rl = self.config.rl
        end = self.sizes.vocab_size
        spec = SamplerSpec(
            rl.response_length,
            self.stage.forbidden,
            (end - 3,),
            end - 1,
            rl.temperature,
            rl.decode_chunk,
        )
        return Sampler(self.stage.model, spec, self.mesh)

    @functools.cached_property
    def sampler_rows(self) -> dict[str, int]:
        """Rows of each rollout program. In stage 1 a group is made only after the feedback."""
        prompts = self.config.rl.rollout_prompts or self.config.train.batch_size
        shared = MODES[self.config.stage] == Mode.SHARED_FIRST_TURN
        every = prompts * self.config.rl.group
        return {"prefill": prompts, "extend": prompts if shared else every, "decode": every}

    @property
    def slots(self) -> int:
        rl = self.config.rl
        return (
            rl.prompt_length
            + rl.response_length
            + (rl.turns - 1) * (rl.feedback_length + rl.response_length)
        )

    def sampler_state(self, rows: int) -> Any:
        """A sampler's state of so many rows where its programs leave it."""
        prompts = self.prompts(rows, self.config.rl.prompt_length)
        state = jax.eval_shape(
            functools.partial(self.sampler._prefill, slots=self.slots), self.params, prompts
        )
        where = state_shardings(self.mesh, self.sizes.num_kv_heads)
        return state.replace(
            cache=_place(state.cache, {"k": where.cache, "v": where.cache}),
            **{
                f.name: _place(getattr(state, f.name), getattr(where, f.name))
                for f in dataclasses.fields(state)
                if f.name != "cache"
            },
        )

    def prefill(self) -> jax.stages.Lowered:
        prompts = self.prompts(self.sampler_rows["prefill"], self.config.rl.prompt_length)
        return self.sampler.lower("prefill", self.params, prompts, slots=self.slots)

    def extend(self) -> jax.stages.Lowered:
        rows = self.sampler_rows["extend"]
        return self.sampler.lower(
            "extend",
            self.params,
            self.sampler_state(rows),
            self.prompts(rows, self.config.rl.feedback_length),
        )

    def decode(self) -> jax.stages.Lowered:
        rows = self.sampler_rows["decode"]
        uids = jax.ShapeDtypeStruct((rows,), np.uint32, sharding=batch_sharding(self.mesh))
        return self.sampler.lower(
            "decode",
            self.params,
            self.sampler_state(rows),
            uids,
            jax.eval_shape(lambda: jax.random.key(0)),
        )


def model_flops(programs: Programs, program: str) -> float:
    """Matmul flops of one call on all devices together; decoding: of one token a row, the cache
    half full.

    Two for each weight and token, and the attention's scores and averages (half of them where it is
    causal). Gradients take three times the forward pass, four times where layers are recomputed
    (`remat` full).
    """
    c, vision = programs.sizes, programs.sizes.vision
    attended = c.num_layers * 4 * c.num_heads * c.head_dim  # flops for each pair of query and key
    layer = (
        c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
        + 3 * c.hidden_size * c.intermediate_size
    )
    token = 2 * c.num_layers * layer
    head = 2 * c.hidden_size * c.vocab_size
    patches = programs.windows * vision.window_patches
    patch = (
        2
        * vision.depth
        * (4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size)
    )
    merged = vision.merge_patches * vision.hidden_size
    patch += 2 * (
        vision.patch_dim * vision.hidden_size
        + (merged**2 + merged * c.hidden_size) / vision.merge_patches
    )
    full = len(vision.fullatt_block_indexes)
    # keys of a query, over all layers
    pairs = full * patches + (vision.depth - full) * vision.window_patches
    image = patches * (patch + 4 * vision.hidden_size * pairs)
    if programs.config.stage in MODES and not programs.stage.trained("visual/"):
        image = 0
    if program == "update" and programs.micro_batches > 1:
        return 0
    if program in ("gradients", "update"):
        shape, length = programs.shape, max(programs.shape.lengths)
        micro = shape.rows * length * (token + head + attended * length / 2) + shape.images * image
        return micro * (4 if c.remat == "full" else 3)
    rows, rl = programs.sampler_rows[program], programs.config.rl
    if program == "decode":
        return rows * (token + head + attended * programs.slots / 2)
    length = rl.prompt_length if program == "prefill" else rl.feedback_length
    return rows * (length * (token + attended * programs.slots) + head + image)


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
