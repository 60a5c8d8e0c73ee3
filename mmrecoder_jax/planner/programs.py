"""The programs that a stage runs, on devices that this machine need not have.

They are the very programs of `rl.sampler` and `learner.update`, at the configuration's largest
buckets, lowered for shapes alone. An RL stage runs all five, a supervised stage the last two:

    prefill     some prompts, each with its image           where a conversation begins
    extend      some feedbacks, each with its image         between two turns
    decode      one token per row, in a loop                most of a rollout
    gradients   of one micro-batch, added to the total      as often as there are micro-batches
    update      the optimizer's step; with one micro-batch  once
                per update also its gradients
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mmrecoder_jax import grpo, sft
from mmrecoder_jax.config import ConfigError, model_config
from mmrecoder_jax.data.batching import BatchShape, Collate, VisionLayout, pad_images
from mmrecoder_jax.env.chart_env import FeedbackImage
from mmrecoder_jax.learner.update import Update, abstract_state, make_optimizer
from mmrecoder_jax.models.decoding import Weights
from mmrecoder_jax.models.processor import ImagePatches
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params
from mmrecoder_jax.models.sharding import batch_sharding, make_mesh, param_shardings
from mmrecoder_jax.rl.learner_batch import learner_shape, slots_of
from mmrecoder_jax.rl.policy import policy_logps
from mmrecoder_jax.rl.sampler import Draft, Places, Plan, Sampler, SamplerSpec, SamplerState
from mmrecoder_jax.rl.schedule import Size
from mmrecoder_jax.rl.trajectory import MODES, Mode
from mmrecoder_jax.stage import is_trained, vision_layout

Batch = dict[str, jax.ShapeDtypeStruct]
STEPS = 1000  # of the learning-rate schedule: a number inside the program, which costs nothing


class Program(enum.StrEnum):
    """What is compiled; see the top of this module."""

    PREFILL = "prefill"
    EXTEND = "extend"
    DECODE = "decode"
    GRADIENTS = "gradients"
    UPDATE = "update"

    @property
    def samples(self) -> bool:
        """Whether it belongs to the rollout and not to the learner."""
        return self in (Program.PREFILL, Program.EXTEND, Program.DECODE)


def programs_of(stage: str) -> tuple[Program, ...]:
    """The programs of a stage, in the order in which a step runs them."""
    return tuple(program for program in Program if stage in MODES or not program.samples)


class Programs:
    """The stage's programs on the devices of a slice, for shapes alone.

    A rollout has `rl.rollout_prompts` prompts (all of them where it is 0) times G rows; an update
    runs `train.batch_size * G` rows in micro-batches. Rows and windows are the largest buckets of
    the configuration.

    Args:
      config: of one stage.
      devices: of one slice (`topology.devices`), or of this machine.

    Raises:
      ConfigError: rows that the devices cannot share.
    """

    def __init__(self, config: ConfigDict, devices: Sequence[jax.Device]):
        sizes = model_config(config)
        self.config, self.sizes, self.mode = config, sizes, MODES.get(config.stage)
        data, slices = config.mesh.data, config.mesh.slices
        if len({getattr(device, "slice_index", 0) for device in devices}) == 1 and data > 0:
            # One slice of a run over several has its share of the copies.
            data, slices = max(1, data // slices), 1
        try:
            axes = data, config.mesh.fsdp, config.mesh.tensor
            self.mesh = make_mesh(*axes, devices, slices)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        # No tokenizer is read: which ids are special changes no shape, so the last ones stand in.
        image_id, pad_id = sizes.vocab_size - 2, sizes.vocab_size - 1
        self.layout = vision_layout(sizes, image_id, pad_id, self.mesh)
        self.model, self.forbidden = Qwen25VL(sizes), (image_id,)
        abstract = jax.eval_shape(lambda: init_params(sizes, jax.random.key(0)))
        self.params = _place(abstract, param_shardings(abstract, self.mesh))
        self.optimizer, self.schedule = make_optimizer(config.optim, STEPS)
        self.state = abstract_state(self.params, self.optimizer, self.mesh, self.trained)
        self.windows = max(config.data.windows)
        self.hosts = len({device.process_index for device in devices})
        self._check_rows()

    def _check_rows(self) -> None:
        fields = {"train.micro_batch_size": self.config.train.micro_batch_size}
        if self.mode is not None:
            prompts = "rl.rollout_prompts" if self.config.rl.rollout_prompts else "train.batch_size"
            fields[prompts] = self.prompts_at_once
        for field, rows in fields.items():
            if rows % self.ways:
                raise ConfigError(
                    f"{field}={rows} rows cannot be split over data*fsdp={self.ways} devices: "
                    "choose a multiple, or cut the model over more devices (--config.mesh.tensor)"
                )

    @property
    def ways(self) -> int:
        """Devices that the rows of a batch are cut over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def encodes_images(self) -> bool:
        """Whether the tower runs inside the programs; in RL a frozen one has run before."""
        return self.mode is None or self.trained("visual/")

    def trained(self, name: str) -> bool:
        """Whether the parameter at this path is trained."""
        return is_trained(self.config, name)

    def reads(self, program: Program, name: str) -> bool:
        """Whether a program reads the parameter at this path.

        XLA drops the others from the program's arguments; they stay in memory beside it.
        """
        if program == Program.DECODE:
            return False  # a copy of its own
        if program == Program.UPDATE and self.micro_batches > 1:
            return self.trained(name)
        if not name.startswith("visual/"):
            return True
        return self.encodes_images

    def lower(self, program: Program) -> jax.stages.Lowered:
        """The program, ready to be compiled."""
        if program == Program.GRADIENTS:
            return self._update.lower("gradients", self.state, self.micro_batch())
        if program == Program.UPDATE:
            name = "whole" if self.micro_batches == 1 else "step"
            return self._update.lower(name, self.state, self.micro_batch())
        state = self.sampler_state()
        if program == Program.DECODE:
            plan = self._plan()
            key = jax.eval_shape(lambda: jax.random.key(0))
            bounds = self._sampler.bounds(self.slots, self.slots)
            how = state, plan, key, jax.ShapeDtypeStruct((), np.float32)
            return self._sampler.lower("decode", self.weights, *how, bounds=bounds)
        rows = self.rows(program)
        prompts, numbers = self.prompts(program), self._numbers(rows)
        if program == Program.EXTEND and self.mode == Mode.FULL_TRAJECTORY:
            rest = (numbers, numbers, numbers, self._draft(rows))
            return self._sampler.lower("extend", self.params, state, prompts, *rest)
        fresh = program == Program.PREFILL
        return self._sampler.lower("fill", self.params, state, prompts, numbers, fresh=fresh)

    def rows(self, program: Program) -> int:
        """Rows of one call, over all devices."""
        if not program.samples:
            return self.shape.rows
        if program == Program.DECODE:
            return self.places.rows
        beside = self.places.prefixes
        if program == Program.EXTEND and self.mode == Mode.FULL_TRAJECTORY:
            beside = self.places.rows
        return min(self.size.prefill, beside // self.ways) * self.ways

    def length(self, program: Program) -> int:
        """Tokens that one call adds to a row, or trains on."""
        if not program.samples:
            return max(self.shape.lengths)
        if program == Program.DECODE:
            return 1
        rl = self.config.rl
        if program == Program.PREFILL:
            return rl.prompt_length
        return self.slots[1] if self.reads_again else rl.feedback_length

    # ------------------------------------------------------------ learner

    @functools.cached_property
    def shape(self) -> BatchShape:
        """Of a micro-batch of all hosts together."""
        config, hosts = self.config, self.hosts
        if self.mode is not None:
            part = learner_shape(config, self.layout, self.mode, hosts)
        else:
            fed_back = self.pictures if config.stage == "sft_self_correction" else 0
            part = sft.sft_shape(config, self.layout, fed_back, hosts)
        return dataclasses.replace(part, rows=part.rows * hosts, images=part.images * hosts)

    @property
    def micro_batches(self) -> int:
        """How many micro-batches an update has."""
        rows = self.config.train.batch_size
        if self.mode is not None:
            rows = rows // self.config.rl.mini_batches * self.config.rl.group
        by_rows = rows // self.shape.rows
        if not self.shape.budget:
            return by_rows
        return -(-by_rows * self._collate.most_tokens // self.shape.budget)

    def micro_batch(self) -> Batch:
        """One of an update's micro-batches."""
        return self._by_row(self._collate.outline(max(self.shape.lengths), self.windows))

    @property
    def tokens(self) -> int:
        """Distinct tokens of a micro-batch, at most, over all devices."""
        return self.micro_batch()["tokens"].size

    @property
    def _collate(self) -> Collate:
        layout = dataclasses.replace(self.layout, ways=self.ways)
        return Collate(self.shape, layout, image_arrays=self.image_arrays)

    @functools.cached_property
    def _update(self) -> Update:
        config = self.config
        temperature = 1.0 if self.mode is None else config.rl.temperature
        chunk = config.model.loss_chunk
        logps = policy_logps(self.model, self.forbidden, temperature, chunk)
        loss = sft.make_loss(logps) if self.mode is None else grpo.make_loss(config, logps)
        limits = {} if self.mode is None else grpo.limits(config.rl)
        return Update(
            *(loss, self.optimizer, self.schedule, self.mesh, self.trained, limits),
            rounding=config.optim.rounding,
        )

    # ------------------------------------------------------------ rollout

    @property
    def prompts_at_once(self) -> int:
        """Prompts that are under way at one time."""
        return self.config.rl.rollout_prompts or self.config.train.batch_size

    @property
    def size(self) -> Size:
        """What a rollout has under way."""
        return Size(prompts=self.config.rl.rollout_prompts, rows=self.config.rl.rows)

    @property
    def slots(self) -> tuple[int, int]:
        """Cache slots of a prefix and of a row."""
        assert self.mode is not None, "of an RL stage"
        return slots_of(self.config, self.mode)

    @property
    def places(self) -> Places:
        """Of all hosts together."""
        prompts, group = self.prompts_at_once, self.config.rl.group
        prefixes, rows = self.size.places(prompts, group, self.ways, 1)
        return Places(rows, prefixes, self.slots[1], self.slots[0])

    @property
    def reads_again(self) -> bool:
        """Whether conversations leave their rows while scripts run (`rl.schedule.Run`), so that
        all they held is read again.
        """
        of_all = self.places.prefixes * self.config.rl.group
        return self.mode == Mode.FULL_TRAJECTORY and self.places.rows < of_all

    @property
    def pictures(self) -> int:
        """How many pictures the feedback on a render shows."""
        return FeedbackImage(self.config.feedback.image).pictures

    def images(self, program: Program) -> int:
        """Images of one call of a program that reads prompts or feedback, over all devices."""
        each = 1
        if program == Program.EXTEND:
            each = self.pictures * (self.config.rl.turns - 1 if self.reads_again else 1)
        return self.rows(program) * each

    def prompts(self, program: Program) -> Batch:
        """What `Sampler.prefill` and `Sampler.extend` take: a piece per row, and its images."""
        rows, length = self.rows(program), self.length(program)
        shapes: dict[str, tuple[int, ...]] = {
            "tokens": (rows, length),
            "vision_index": (rows, length),
            "positions": (rows, 3, length),
            "lengths": (rows,),
        }
        arrays = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
        images = self.image_arrays([], self.images(program), self.windows, self.layout)
        return self._by_row(arrays | images)

    def sampler_state(self) -> SamplerState:
        """The state of the conversations under way, where the sampler's programs leave it."""
        return self._sampler.abstract_state(self.places)

    @functools.cached_property
    def weights(self) -> Weights:
        """The copy of the policy that decoding reads."""
        return self._sampler.abstract_weights()

    def _plan(self) -> Plan[jax.ShapeDtypeStruct]:
        rows, prefixes = self.places.rows, self.places.prefixes
        numbers = self._numbers(rows)
        return Plan(
            start=self._numbers(rows, kind=bool),
            prefix=numbers,
            members=self._numbers(prefixes, self.config.rl.group),
            place=numbers,
            uid=self._numbers(rows, kind=np.uint32),
            turn=numbers,
            limit=numbers,
        )

    def _draft(self, rows: int) -> Draft[jax.ShapeDtypeStruct]:
        response = rows, self.config.rl.response_length
        logps = self._numbers(*response, kind=np.float32)
        return Draft(self._numbers(*response), logps, logps, self._numbers(rows))

    def _numbers(self, *shape: int, kind: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=batch_sharding(self.mesh))

    @functools.cached_property
    def _sampler(self) -> Sampler:
        rl, size = self.config.rl, self.sizes.vocab_size
        spec = SamplerSpec(
            response_length=rl.response_length,
            forbidden=self.forbidden,
            eos_ids=(size - 3,),
            pad_id=self.layout.pad_id,
            temperature=rl.temperature,
            chunk=rl.decode_chunk,
        )
        return Sampler(self.model, spec, self.mesh)

    # ------------------------------------------------------------ both

    def image_arrays(
        self,
        images: Sequence[ImagePatches | None],
        count: int,
        windows: int,
        layout: VisionLayout,
    ) -> dict[str, np.ndarray]:
        """Patches, or in RL what a frozen tower made of them."""
        if self.encodes_images:
            return pad_images(images, count, windows, layout)
        shape = (count, layout.merged(windows), self.sizes.hidden_size)
        return {"features": np.zeros(shape, jax.numpy.dtype(self.sizes.dtype))}

    def _by_row(self, arrays: dict[str, np.ndarray]) -> Batch:
        where = batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
            for name, x in arrays.items()
        }


def model_flops(programs: Programs, program: Program) -> float:
    """Matmul flops of one call on all devices together.

    Two per weight and token, and the attention's scores and averages (half of them where it is
    causal). Gradients take three times the forward pass, four times where layers are recomputed
    (`remat` full). Decoding counts one token per row, with the cache half full.
    """
    c = programs.sizes
    attended = c.num_layers * 4 * c.num_heads * c.head_dim  # per pair of query and key
    layer = (
        c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
        + 3 * c.hidden_size * c.intermediate_size
    )
    token = 2 * c.num_layers * layer
    head = 2 * c.hidden_size * c.vocab_size
    image = _image_flops(programs) if programs.encodes_images else 0.0
    if program == Program.UPDATE and programs.micro_batches > 1:
        return 0
    if not program.samples:
        shape, length = programs.shape, programs.length(program)
        forward = (
            programs.tokens * (token + head)
            + shape.rows * attended * length**2 / 2
            + shape.images * image
        )
        return forward * (4 if c.remat == "full" else 3)
    rows, slots = programs.rows(program), sum(programs.slots)
    if program == Program.DECODE:
        return rows * (token + head + attended * slots / 2)
    text = rows * (programs.length(program) * (token + attended * slots) + head)
    return text + programs.images(program) * image


def _image_flops(programs: Programs) -> float:
    """Of the tower and its merger for one image of the largest bucket."""
    vision, hidden = programs.sizes.vision, programs.sizes.hidden_size
    patches = programs.windows * vision.window_patches
    merged = vision.merge_patches * vision.hidden_size
    layer = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size
    merger = (merged**2 + merged * hidden) / vision.merge_patches  # per patch
    patch = 2 * (vision.depth * layer + vision.patch_dim * vision.hidden_size + merger)
    full = len(vision.fullatt_block_indexes)
    # Keys of a query over all layers: few layers see the whole image, the others their window.
    keys = full * patches + (vision.depth - full) * vision.window_patches
    return patches * (patch + 4 * vision.hidden_size * keys)


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
