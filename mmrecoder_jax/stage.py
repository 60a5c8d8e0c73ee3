"""From a configuration to the objects that one stage needs: mesh, tokenizer, model, environment."""

import contextlib
import dataclasses
import json
import os
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmrecoder_jax import places
from mmrecoder_jax.config import (
    SIZES_FILE,
    ConfigError,
    check_choice,
    data_dir,
    derived_seed,
    model_config,
    naming,
    weights_directory,
    work_directory,
)
from mmrecoder_jax.data.batching import VisionLayout
from mmrecoder_jax.data.grammars import GRAMMARS
from mmrecoder_jax.data.sources import ChartDirectory
from mmrecoder_jax.env.chart_env import FeedbackImage
from mmrecoder_jax.env.chartmimic import ScoreMode
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.learner.init import initial_params
from mmrecoder_jax.models.config import ModelConfig
from mmrecoder_jax.models.lora import is_adapter
from mmrecoder_jax.models.processor import Processor
from mmrecoder_jax.models.published import published_config
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL
from mmrecoder_jax.models.sharding import host_ways, make_mesh
from mmrecoder_jax.models.tokenizer import ChartTokenizer, load_tokenizer
from mmrecoder_jax.rl.judge.base import Judge
from mmrecoder_jax.rl.judge.make import make_judge
from mmrecoder_jax.rl.policy import TokenLogps, policy_logps
from mmrecoder_jax.rl.rollout import Environment, RolloutEngine
from mmrecoder_jax.rl.sampler import Sampler, SamplerSpec
from mmrecoder_jax.rl.schedule import RolloutSpec, Run
from mmrecoder_jax.rl.served.make import make_decoder
from mmrecoder_jax.rl.vision_features import FrozenTower


@dataclasses.dataclass(frozen=True)
class Stage:
    """The objects of one stage.

    Attributes:
      config: every field of the stage.
      workdir: where it writes.
      layout: what batching must know of the model and the mesh.
      forbidden: token ids that are never sampled.
    """

    config: ConfigDict
    workdir: str
    mesh: Mesh
    tokenizer: ChartTokenizer
    processor: Processor
    model: Qwen25VL
    layout: VisionLayout
    forbidden: tuple[int, ...]

    def charts(self, split: str) -> ChartDirectory:
        """One split of the configured charts; raises ConfigError where it does not exist."""
        path = os.path.join(data_dir(self.config, self.workdir), split)
        if not os.path.isdir(path):
            raise ConfigError(
                f"no charts at {path} (data.dir={self.config.data.dir!r}): make them from a "
                "published data set with `python -m mmrecoder_jax.import_charts --kind=... "
                f"--path=... --out={path}`, or run the embedded default, e.g. `python -m "
                "mmrecoder_jax.train --config=pipeline:tiny --workdir=runs/tiny`"
            )
        try:
            return ChartDirectory(path, self.config.data.instruction)
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.dir={self.config.data.dir!r}: {error}") from error

    def judge(self) -> contextlib.AbstractContextManager[Judge | None]:
        """The configured judge as a context manager, its scores kept in `<workdir>/judge`; gives
        None where there is none.
        """
        judge = make_judge(self.config, self.workdir, self.mesh)
        return contextlib.nullcontext() if judge is None else judge

    def engine(
        self, env: Environment, temperature: float, judge: Judge | None = None
    ) -> RolloutEngine:
        """Sampler and environment together, at one temperature (0 is greedy)."""
        config, rl = self.config, self.config.rl
        windows = tuple(config.data.windows)
        spec = SamplerSpec(
            response_length=rl.response_length,
            forbidden=self.forbidden,
            eos_ids=tuple(self.tokenizer.eos_ids),
            pad_id=self.tokenizer.pad_id,
            temperature=temperature,
            chunk=rl.decode_chunk,
            # Evaluations and drafts sample from the whole policy.
            **{name: rl[name] for name in ("top_k", "top_p", "min_p") if name in rl},
            stop=tuple(tuple(self.tokenizer.encode(text)) for text in rl.get("stop", ())),
        )
        rollout = RolloutSpec(
            prompt_length=rl.prompt_length,
            # Cold start 2 samples first turns alone: it has neither feedback nor scores.
            feedback_length=rl.feedback_length if "feedback_length" in rl else 0,
            windows=windows,
            feedback=config.feedback.to_dict(),
            score_mode=config.reward.mode if "reward" in config else ScoreMode.TRAINING,
        )
        tower = None
        if not self.trained("visual/"):
            tower = FrozenTower(self.model, self.mesh, self.layout, windows)
        sampler = Sampler(self.model, spec, self.mesh)
        # Evaluations and drafts have no choice of who decodes.
        decoder = (
            make_decoder(config, self.workdir, self.model.config, self.tokenizer)
            if "engine" in config
            else Run
        )
        return RolloutEngine(
            sampler, self.processor, env, self.layout, rollout, tower, judge, decoder
        )

    def token_logps(self, temperature: float = 1.0, learns_entropy: bool = False) -> TokenLogps:
        """`logps(params, micro_batch)` of this stage's model."""
        chunk = self.config.model.loss_chunk
        return policy_logps(self.model, self.forbidden, temperature, chunk, learns_entropy)

    def initial_params(self) -> Any:
        """The policy to start from, in its shards (`learner.init`)."""
        return initial_params(self.config, self.model.config, self.mesh)

    def trained(self, name: str) -> bool:
        """Whether the parameter at this path is trained."""
        return is_trained(self.config, name)

    def saved(self, name: str) -> bool:
        """Whether a checkpoint holds the parameter at this path: the adapters alone where there are
        any.
        """
        return not self.config.lora.rank or is_adapter(name)

    def write_config(self) -> None:
        """Creates the work directory with configuration, sizes and tokenizer, so that a later stage
        can start from it.
        """
        if not distributed.is_main():
            return
        os.makedirs(self.workdir, exist_ok=True)
        sizes = self.model.config
        files = {
            "config.json": json.loads(places.shown(self.config.to_json_best_effort())),
            SIZES_FILE: published_config(sizes, sizes.param_dtype),
        }
        for name, content in files.items():
            path = os.path.join(self.workdir, name)
            with open(path + ".tmp", "w", encoding="utf-8") as f:
                json.dump(content, f, indent=1, sort_keys=True)
            os.replace(path + ".tmp", path)
        target = os.path.join(self.workdir, "tokenizer")
        if not os.path.isdir(target):
            self.tokenizer.save(target)


def build(config: ConfigDict, workdir: str, tokenizer_dir: str | None = None) -> Stage:
    """Builds everything but parameters and environment.

    Args:
      tokenizer_dir: where to read the tokenizer, before all other places.

    Raises:
      ConfigError: a value that does not exist, no tokenizer anywhere, or one with more ids than the
        model's embedding has rows.
    """
    if "image" in config.feedback:
        check_choice("feedback.image", config.feedback.image, tuple(FeedbackImage))
    if "reward" in config:
        check_choice("reward.mode", config.reward.mode, tuple(ScoreMode))
    sizes = model_config(config)
    source = config.init_from
    for candidate in (
        tokenizer_dir,
        os.path.join(workdir, "tokenizer"),
        os.path.join(work_directory(source), "tokenizer"),
        _weights_directory(source),
    ):
        if candidate and os.path.isdir(candidate):
            with naming("tokenizer"):
                tokenizer = load_tokenizer(candidate, sizes.vocab_size)
            break
    else:
        raise ConfigError(f"no tokenizer in {workdir}/tokenizer nor at config.init_from={source!r}")
    p = config.processor
    processor = Processor(tokenizer, sizes.vision, p.min_pixels, p.max_pixels, p.system)
    mesh = _mesh(config)
    layout = vision_layout(sizes, tokenizer.image_pad_id, tokenizer.pad_id, mesh)
    forbidden = tuple(tokenizer.forbidden_ids(sizes.vocab_size))
    return Stage(config, workdir, mesh, tokenizer, processor, Qwen25VL(sizes), layout, forbidden)


def _weights_directory(source: str) -> str:
    with naming("init_from"):
        return weights_directory(source) if source else ""


def _mesh(config: ConfigDict) -> Mesh:
    try:
        axes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
        return make_mesh(*axes, slices=config.mesh.slices)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def is_trained(config: ConfigDict, name: str) -> bool:
    """Whether a stage trains the parameter at this path: adapters alone, all but the vision tower,
    or everything.
    """
    if config.lora.rank:
        return is_adapter(name)
    return not (config.model.freeze_vision and name.startswith("visual/"))


def vision_layout(sizes: ModelConfig, image_id: int, pad_id: int, mesh: Mesh) -> VisionLayout:
    """What batching must know of a model of these sizes, and of the mesh.

    Raises:
      ConfigError: a mesh that its hosts cannot share.
    """
    try:
        ways = host_ways(mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return VisionLayout.of(sizes, image_id, pad_id, ways)


def env_config(config: ConfigDict) -> EnvConfig:
    """`config.env` as the environment's own type; synthetic charts bring their house style."""
    style = GRAMMARS[config.data.grammar].RC_PARAMS if config.data.kind == "synthetic" else {}
    seed = derived_seed(config, "replay")
    return EnvConfig(**config.env.to_dict(), rc_params=style, replay_seed=seed)
