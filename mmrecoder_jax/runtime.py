"""From a configuration to the objects that every stage needs: mesh, tokenizer, processor, model,
parameters, environment.
"""

import contextlib
import dataclasses
import json
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.batching import VisionLayout
from mmrecoder_jax.data.sources import ChartDirectory
from mmrecoder_jax.env import ChartEnv, EnvConfig
from mmrecoder_jax.env.chart_env import FEEDBACK_IMAGES
from mmrecoder_jax.learner import checkpoint, distributed
from mmrecoder_jax.models.config import LoraConfig, ModelConfig, preset
from mmrecoder_jax.models.lora import is_adapter, merge
from mmrecoder_jax.models.processor import Processor
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params, visual_tokens
from mmrecoder_jax.models.sharding import each_on_its_rows, host_ways, make_mesh, param_shardings
from mmrecoder_jax.models.tokenizer import ChartTokenizer, load_tokenizer
from mmrecoder_jax.models.trees import join, split
from mmrecoder_jax.models.weights import load_pretrained
from mmrecoder_jax.rl.judge.base import Judge
from mmrecoder_jax.rl.judge.make import make_judge
from mmrecoder_jax.rl.losses import token_logps
from mmrecoder_jax.rl.rollout import RolloutEngine, RolloutSpec
from mmrecoder_jax.rl.sampler import Sampler, SamplerSpec
from mmrecoder_jax.rl.vision_features import FrozenTower

# fields of config.model that the preset does not decide
SWITCHES = (
    "dtype",
    "param_dtype",
    "remat",
    "attention",
    "scan_unroll",
)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The objects of one stage. `workdir` is where it writes."""

    config: ConfigDict
    workdir: str
    mesh: Mesh
    tokenizer: ChartTokenizer
    processor: Processor
    model: Qwen25VL
    layout: VisionLayout
    forbidden: tuple[int, ...]

    def env(self) -> ChartEnv:
        """A fresh executor pool; close it (it is a context manager)."""
        return ChartEnv(env_config(self.config))

    def judge(self) -> Judge | contextlib.nullcontext:
        """The configured judge; a context manager that gives None where there is none."""
        return make_judge(self.config, self.workdir, self.mesh) or contextlib.nullcontext()

    def engine(
        self, env: ChartEnv, temperature: float, judge: Judge | None = None
    ) -> RolloutEngine:
        """Sampler and environment together, at one temperature (0 is greedy)."""
        rl = self.config.rl
        spec = SamplerSpec(
            response_length=rl.response_length,
            forbidden=self.forbidden,
            eos_ids=tuple(self.tokenizer.eos_ids),
            pad_id=self.tokenizer.pad_id,
            temperature=temperature,
            chunk=rl.decode_chunk,
        )
        rollout = RolloutSpec(
            rl.prompt_length,
            rl.feedback_length,
            tuple(self.config.data.windows),
            self.config.feedback.to_dict(),
            self.config.reward.mode,
        )
        windows = tuple(self.config.data.windows)
        tower = (
            None
            if self.trained("visual/")
            else FrozenTower(self.model, self.mesh, self.layout, windows)
        )
        return RolloutEngine(
            Sampler(self.model, spec, self.mesh),
            self.processor,
            env,
            self.layout,
            rollout,
            tower,
            judge,
        )

    def trained(self, name: str) -> bool:
        """Whether the parameter at this path is trained: adapters alone, all but the vision tower,
        or everything.
        """
        if self.config.lora.rank:
            return is_adapter(name)
        return not (self.config.model.freeze_vision and name.startswith("visual/"))

    def saved(self, name: str) -> bool:
        """Whether a checkpoint holds the parameter at this path: the adapters alone where there are
        any.
        """
        return not self.config.lora.rank or is_adapter(name)

    def token_logps(
        self, params: Any, batch: dict[str, Array], temperature: float = 1.0
    ) -> tuple[Array, Array]:
        """Log-probabilities of a micro-batch's tokens and the entropies they were drawn with,
        float32 `[B, L]`; traceable.
        """
        variables = {"params": params}
        features = visual_tokens(self.model, params, batch)
        hidden = self.model.apply(
            variables,
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            batch["vision_index"],
            features,
        )
        forbidden = np.zeros(self.model.config.vocab_size, bool)
        forbidden[list(self.forbidden)] = True

        def of_rows(head, hidden, tokens):
            def logits(x):
                return self.model.apply(variables, x, head, method=Qwen25VL.logits)

            return token_logps(
                logits, hidden, tokens, forbidden, temperature, self.config.model.loss_chunk
            )

        head = self.model.apply(variables, method=Qwen25VL.head)
        return each_on_its_rows(of_rows, head, hidden, batch["tokens"])

    def charts(self, split: str) -> ChartDirectory:
        """One split of the configured charts."""
        path = os.path.join(data_dir(self.config, self.workdir), split)
        if not os.path.isdir(path):
            raise ConfigError(
                f"no charts at {path} (data.dir={self.config.data.dir!r}): make them from a published data set with "
                f"`python scripts/import_charts.py --kind=... --path=... --out={path}`, or run the embedded default, e.g. "
                "`python -m mmrecoder_jax.train --config=configs/pipeline.py:tiny "
                "--workdir=runs/tiny`"
            )
        return ChartDirectory(path, self.config.data.instruction)

    def initial_params(self) -> Any:
        """The policy to start from, in its shards: random from nothing, else that of `init_from`;
        with adapters where they are configured.

        Adapters of an earlier stage are carried on where rank, alpha and targets are the same;
        otherwise they are merged into the weights.
        """
        lora = self.model.config.lora
        base, adapters = self._read(self.config.init_from, lora)
        if lora.rank and adapters is None:
            adapters = self._random(self.model.config, adapters_only=True)
        return join(base, adapters) if lora.rank else base

    def _read(self, source: str, lora: LoraConfig) -> tuple[Any, Any]:
        """(weights, adapters of `lora` that belong to them or None): the policy of `source`."""
        config = dataclasses.replace(self.model.config, lora=LoraConfig())
        if not source:
            return self._random(config), None
        if not os.path.isdir(os.path.join(source, "checkpoints")):
            return self._published(source, config), None
        with open(os.path.join(source, "config.json"), encoding="utf-8") as f:
            saved = json.load(f)
        # work directories from before there were adapters
        theirs = lora_config(saved["lora"]) if "lora" in saved else LoraConfig()
        if not theirs.rank:
            return checkpoint.load_params(source, self._abstract(config)), None
        if not os.path.exists(os.path.join(saved["init_from"], "config.json")):
            raise ConfigError(
                f"{source} holds adapters alone, of the weights at {saved['init_from']!r}, which is not there (seen from {os.getcwd()})"
            )
        base, _ = self._read(saved["init_from"], theirs)
        abstract = self._abstract(dataclasses.replace(config, lora=theirs))
        adapters = checkpoint.load_params(source, split(abstract, is_adapter)[0])
        if theirs == lora:
            return base, adapters
        where = jax.tree.map(lambda x: x.sharding, base)
        return jax.jit(lambda params: merge(params, theirs), out_shardings=where)(
            join(base, adapters)
        ), None

    def _abstract(self, config: ModelConfig) -> Any:
        """Shapes, types and shards of a model's parameters."""
        abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract,
            param_shardings(abstract, self.mesh),
        )

    def _random(self, config: ModelConfig, adapters_only: bool = False) -> Any:
        """Parameters to train from nothing, or fresh adapters (which change nothing yet), from
        `config.seed`.
        """

        def chosen(params):
            return split(params, is_adapter)[0] if adapters_only else params

        where = jax.tree.map(lambda x: x.sharding, chosen(self._abstract(config)))
        key = jax.random.key(self.config.seed)
        with jax.set_mesh(self.mesh):
            return jax.jit(lambda: chosen(init_params(config, key)), out_shardings=where)()

    def _published(self, source: str, config: ModelConfig) -> Any:
        """The weights of a Hugging Face directory."""
        switches = {name: getattr(config, name) for name in SWITCHES}
        published, params = load_pretrained(
            source, lambda tree: param_shardings(tree, self.mesh), **switches
        )
        if published != config:
            raise ConfigError(
                f"config.json in {source} is not of the size model.preset={self.config.model.preset!r}: "
                "set --config.model.preset to its size"
            )
        return params


def env_config(config: ConfigDict) -> EnvConfig:
    """`config.env` as the environment's own type; the house style of synthetic charts comes with
    their kind.
    """
    fields = config.env.to_dict()
    if config.data.kind == "synthetic":
        from mmrecoder_jax.data.synthetic import RC_PARAMS

        fields["rc_params"] = RC_PARAMS | fields["rc_params"]
    fields["preload"] = tuple(fields["preload"])
    return EnvConfig(**fields)


def data_dir(config: ConfigDict, workdir: str) -> str:
    """Where the chart directories are: `data.dir`, or `<workdir>/data`."""
    return config.data.dir or os.path.join(workdir, "data")


def lora_config(section: Any) -> LoraConfig:
    """The `lora` section of a configuration, or of a saved config.json."""
    return LoraConfig(section["rank"], float(section["alpha"]), tuple(section["targets"]))


def model_config(config: ConfigDict) -> ModelConfig:
    """The preset with the configured types, switches and adapters. Raises ConfigError for a name or
    size that does not exist.
    """
    m = config.model
    switches = {name: m[name] for name in SWITCHES}
    try:
        return dataclasses.replace(preset(m.preset), **switches, lora=lora_config(config.lora))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def vision_layout(sizes: ModelConfig, image_id: int, pad_id: int, mesh: Mesh) -> VisionLayout:
    """What batching must know of a model of these sizes, and of the mesh. Raises ConfigError for a
    mesh that its hosts cannot share.
    """
    try:
        ways = host_ways(mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return VisionLayout.of(sizes, image_id, pad_id, ways)


def find_source(config: ConfigDict) -> None:
    """Checks `init_from` before anything heavy starts. Raises ConfigError that says what was looked
    for and what runs without it.
    """
    stage, source = config.stage, config.init_from
    tiny = f"python -m mmrecoder_jax.train --config=configs/{stage}.py:tiny --workdir=runs/{stage}"
    needs = {
        "sft_self_correction": "sft_chart2code",
        "stage1": "sft_self_correction",
        "stage2": "stage1",
        "evaluate": "stage2",
    }
    if not source:
        if config.lora.rank:
            raise ConfigError(
                f"lora.rank={config.lora.rank} with an empty config.init_from: adapters need weights to adapt, a Hugging Face directory "
                "or the work directory of an earlier stage"
            )
        if config.size == "paper" or stage in needs:
            earlier = needs.get(stage, "pipeline")
            raise ConfigError(
                f"config.init_from is empty: {stage} starts from an earlier stage's work directory or a Hugging Face directory "
                f"(--config.init_from=DIR). To make one: python -m mmrecoder_jax.train --config=configs/pipeline.py:tiny "
                f"--workdir=runs/tiny, then --config.init_from=runs/tiny/{earlier}"
            )
        return
    if os.path.isdir(os.path.join(source, "checkpoints")):
        return
    if os.path.exists(os.path.join(source, "config.json")):
        return
    remedy = f"{tiny} --config.init_from=runs/tiny/{needs[stage]}" if stage in needs else tiny
    raise ConfigError(
        f"no weights at config.init_from={source!r}: looked for the directory {os.path.abspath(source)} with checkpoints/ (a work "
        f"directory of ours) or config.json and *.safetensors (a Hugging Face directory; download the hub id {source!r} there, e.g. "
        f"`hf download {source} --local-dir {source}`). Without weights this runs: {remedy}"
    )


def build(config: ConfigDict, workdir: str, tokenizer_dir: str | None = None) -> Runtime:
    """Builds everything but parameters and environment. `tokenizer_dir` overrides where the
    tokenizer is read from.
    """
    if config.feedback.image not in FEEDBACK_IMAGES:
        raise ConfigError(
            f"feedback.image={config.feedback.image!r}: use one of {', '.join(FEEDBACK_IMAGES)}"
        )
    sizes = model_config(config)
    for candidate in (
        tokenizer_dir,
        os.path.join(workdir, "tokenizer"),
        os.path.join(config.init_from, "tokenizer"),
        config.init_from,
    ):
        if candidate and os.path.isdir(candidate):
            tokenizer = load_tokenizer(candidate)
            break
    else:
        raise ConfigError(
            f"no tokenizer in {workdir}/tokenizer nor at config.init_from={config.init_from!r}"
        )
    p = config.processor
    processor = Processor(tokenizer, sizes.vision, p.min_pixels, p.max_pixels, p.system)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    layout = vision_layout(sizes, tokenizer.image_pad_id, tokenizer.pad_id, mesh)
    forbidden = tuple(tokenizer.forbidden_ids(sizes.vocab_size))
    return Runtime(config, workdir, mesh, tokenizer, processor, Qwen25VL(sizes), layout, forbidden)


def prepare_workdir(runtime: Runtime) -> None:
    """Creates the work directory and puts configuration and tokenizer into it, so that a later
    stage can start from it.
    """
    if not distributed.is_main():
        return
    os.makedirs(runtime.workdir, exist_ok=True)
    path = os.path.join(runtime.workdir, "config.json")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(json.loads(runtime.config.to_json_best_effort()), f, indent=1, sort_keys=True)
    os.replace(path + ".tmp", path)
    target = os.path.join(runtime.workdir, "tokenizer")
    if not os.path.isdir(target):
        runtime.tokenizer.save(target)
