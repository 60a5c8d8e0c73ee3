"""What each field of a configuration may be: a range, a choice, a path.

`check_fields` reads the whole table before anything heavy starts, for every command. What depends
on several fields is in `checks`, what depends on hosts and devices where they are known
(`rl.learner_batch.check_rl`, `sft.train`).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ml_collections import ConfigDict

from mmrecoder_jax.config import (
    PUBLISHED,
    SIZES,
    ConfigError,
    check_choice,
    check_local_path,
    check_place,
    field_names,
    load,
)
from mmrecoder_jax.env.channel import SecretError, read_secret
from mmrecoder_jax.env.chart_env import FeedbackImage
from mmrecoder_jax.env.chartmimic import ScoreMode
from mmrecoder_jax.env.interpreter import InterpreterError, find
from mmrecoder_jax.env.remote import HostsError, check_hosts, parse_address
from mmrecoder_jax.env.sandbox.confinement import SandboxMode
from mmrecoder_jax.learner.update import OPTIMIZERS, ROUNDINGS, SCHEDULES
from mmrecoder_jax.models.config import LORA_TARGETS, PRESETS, Kernel, Remat
from mmrecoder_jax.monitoring.alarms import MONITORS
from mmrecoder_jax.prepare import DATA_KINDS, GRAMMAR_NAMES
from mmrecoder_jax.rl.advantages import Baseline, Credit
from mmrecoder_jax.rl.judge.make import Asked, BackEnd
from mmrecoder_jax.rl.learner_batch import TRUNCATED
from mmrecoder_jax.rl.losses import Divergence, PenaltyIn, Ratio
from mmrecoder_jax.rl.served.make import EngineKind
from mmrecoder_jax.rl.web import check_address, check_variable, read_key

Check = Callable[[str, Any], None]  # (field, value); raises ConfigError


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers that a field may be.

    Attributes:
      least, most: the ends, which are allowed.
      above: a number below all, not allowed itself.
      below: a number above all, not allowed itself.
      whole: whether only whole numbers are.
      because: what a user should know of the limit.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    whole: bool = False
    because: str = ""

    def __call__(self, field: str, value: Any) -> None:
        """Raises ConfigError for a value outside."""
        if not self._holds(value):
            reason = f" ({self.because})" if self.because else ""
            raise ConfigError(f"{field}={value!r}: use {self}{reason}")

    def _holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        inside = self.least <= value <= self.most and self.above < value < self.below
        return inside and math.isfinite(value)

    def __str__(self) -> str:
        parts = ["a whole number" if self.whole else "a number"]
        if self.least > -math.inf:
            parts.append(f"{self.least:g} or more")
        if self.above > -math.inf:
            parts.append(f"above {self.above:g}")
        if self.most < math.inf:
            parts.append(f"{self.most:g} or less")
        if self.below < math.inf:
            parts.append(f"less than {self.below:g}")
        return ", ".join(parts)


def _pattern(field: str, value: Any) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(
            f"{field}={value!r} is no regular expression ({error}): name the ends of paths, such "
            "as kernel$"
        ) from error


def choice(names: Collection[str]) -> Check:
    """A field that is one of some words."""

    def check(field: str, value: Any) -> None:
        check_choice(field, value, tuple(names))

    return check


def words(
    names: Collection[str] | None = None, example: tuple[str, ...] = ("numpy", "matplotlib")
) -> Check:
    """A field that is a tuple of words, each of them one of `names` where there are any."""

    def check(field: str, value: Any) -> None:
        if not isinstance(value, tuple) or not all(isinstance(word, str) for word in value):
            raise ConfigError(f"{field}={value!r}: use words, such as {example}")
        if names is not None and (not value or set(value) - set(names)):
            raise ConfigError(f"{field}={value!r}: use some of {', '.join(names)}")

    return check


def text(field: str, value: Any) -> None:
    """A field that is any text."""
    if not isinstance(value, str):
        raise ConfigError(f"{field}={value!r}: use a text")


def name(field: str, value: Any) -> None:
    """A field that is a text which says something."""
    text(field, value)
    if not value.strip():
        raise ConfigError(f"{field}={value!r}: it must not be empty")


def path(field: str, value: Any) -> None:
    """A field that is a local path, or empty."""
    text(field, value)
    check_local_path(field, value)


def place(field: str, value: Any) -> None:
    """A field that is a local path, a folder in a bucket, or empty."""
    text(field, value)
    check_place(field, value)


def python(field: str, value: Any) -> None:
    """A field that is a Python which executors can run on, or empty."""
    path(field, value)
    try:
        find(value, field)
    except InterpreterError as problem:
        raise ConfigError(str(problem)) from problem


def addresses(field: str, value: Any) -> None:
    """A field that is a tuple of places to connect to."""
    words(example=("10.0.0.5:7435",))(field, value)
    for place in value:
        try:
            parse_address(place)
        except ValueError as problem:
            raise ConfigError(f"{field}={value!r}: {problem}") from problem


def secret(field: str, value: Any) -> None:
    """A field that is a file with a secret, or empty."""
    path(field, value)
    try:
        read_secret(value, field)
    except SecretError as problem:
        raise ConfigError(str(problem)) from problem


def address(field: str, value: Any) -> None:
    """A field that is the address of a server."""
    text(field, value)
    check_address(field, value)


def engine_address(field: str, value: Any) -> None:
    """A field that is the address of a server of rollouts."""
    text(field, value)
    check_address(field, value, "http://localhost:30000")


def variable(field: str, value: Any) -> None:
    """A field that names an environment variable, or is empty."""
    text(field, value)
    check_variable(field, value)


def switch(field: str, value: Any) -> None:
    """A field that is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{field}={value!r}: use true or false")


def buckets(field: str, value: Any) -> None:
    """A field that is a tuple of sizes that grow."""
    right = isinstance(value, tuple) and all(map(COUNT._holds, value))
    if not right or not value or list(value) != sorted(set(value)):
        raise ConfigError(f"{field}={value!r}: use sizes that grow, such as (512, 1024)")


COUNT = Range(1, whole=True)
COUNT_OR_NONE = Range(0, whole=True, because="0 turns it off, or leaves it to other fields")
POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
SEED = Range(0, 2**31 - 1, whole=True)
_AXIS = Range(-1, whole=True, because="-1 takes the devices that the other axes leave")
_DECAY = Range(0, below=1)
_DTYPES = choice(("float32", "bfloat16"))

FIELDS: dict[str, Check] = {
    "stage": name,
    "size": choice(SIZES),
    "seed": SEED,
    "init_from": place,
    "model.preset": choice((*PRESETS, PUBLISHED)),
    "model.dtype": _DTYPES,
    "model.param_dtype": _DTYPES,
    "model.remat": choice(tuple(Remat)),
    "model.attention": choice(tuple(Kernel)),
    "model.scan_unroll": COUNT,
    "model.loss_chunk": COUNT,
    "model.freeze_vision": switch,
    "lora.rank": COUNT_OR_NONE,
    "lora.alpha": POSITIVE,
    "lora.targets": words(LORA_TARGETS),
    "processor.min_pixels": COUNT,
    "processor.max_pixels": COUNT,
    "processor.system": text,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.cpu_devices": COUNT,
    "mesh.slices": COUNT,
    "mesh.join_seconds": Range(1),
    "mesh.silent_seconds": Range(1),
    "data.dir": place,
    "data.kind": choice(DATA_KINDS),
    "data.grammar": choice(GRAMMAR_NAMES),
    "data.dialogues": place,
    "data.gallery": place,
    "data.gallery_sample": COUNT_OR_NONE,
    "data.instruction": name,
    "data.seed": SEED,
    "data.train_count": COUNT_OR_NONE,
    "data.val_count": COUNT_OR_NONE,
    "data.test_count": COUNT_OR_NONE,
    "data.lengths": buckets,
    "data.windows": buckets,
    "data.max_bad_rows": Range(0, because="below 1 it is a share of the rows"),
    "dialogues.policy": COUNT_OR_NONE,
    "dialogues.synthetic": COUNT_OR_NONE,
    "dialogues.right": SHARE,
    "dialogues.later": SHARE,
    "dialogues.min_gain": Range(-1, 1),
    "dialogues.temperature": NOT_NEGATIVE,
    "dialogues.batch_size": COUNT,
    "train.steps": Range(0, whole=True, because="0 counts them from train.epochs"),
    "train.epochs": POSITIVE,
    "train.batch_size": COUNT,
    "train.micro_batch_size": COUNT,
    "train.micro_tokens": COUNT_OR_NONE,
    "train.log_every": COUNT,
    "train.eval_every": COUNT_OR_NONE,
    "train.eval_batches": COUNT,
    "train.single_turn_share": _DECAY,
    "optim.name": choice(OPTIMIZERS),
    "optim.lr": Range(0, because="a learning rate such as 1e-5"),
    "optim.b1": _DECAY,
    "optim.b2": _DECAY,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.decay": _pattern,
    "optim.rounding": choice(ROUNDINGS),
    "optim.ema": _DECAY,
    "optim.warmup_steps": COUNT_OR_NONE,
    "optim.schedule": choice(SCHEDULES),
    "optim.decay_share": SHARE,
    "optim.clip": Range(
        above=0, because="the largest norm of the gradients; a large one, 1e9, clips nothing"
    ),
    "optim.patch_embed_lr": POSITIVE,
    "optim.max_skipped": Range(
        1, whole=True, because="1 ends the run at the first update that is not finite"
    ),
    "rl.group": Range(2, whole=True, because="an advantage compares answers to one prompt"),
    "rl.turns": COUNT,
    "rl.temperature": Range(
        above=0, because="greedy answers, at 0, are all alike and teach nothing; 1.0 is usual"
    ),
    "rl.prompt_length": COUNT,
    "rl.feedback_length": COUNT,
    "rl.response_length": COUNT,
    "rl.decode_chunk": COUNT,
    "rl.rollout_prompts": COUNT_OR_NONE,
    "rl.rows": COUNT_OR_NONE,
    "rl.top_k": COUNT_OR_NONE,
    "rl.top_p": Range(above=0, most=1),
    "rl.min_p": SHARE,
    "rl.stop": words(),
    "rl.ahead": COUNT_OR_NONE,
    "rl.partial": COUNT_OR_NONE,
    "rl.max_importance": Range(least=1, because="1 lets no token count more than one of today's"),
    "rl.aggregation": choice(("token_mean", "sequence_mean", "constant")),
    "rl.truncated": choice(TRUNCATED),
    "rl.std_ddof": Range(0, 1, whole=True),
    "rl.std_eps": POSITIVE,
    "rl.updates_per_batch": COUNT,
    "rl.mini_batches": COUNT,
    "rl.resample": COUNT_OR_NONE,
    "rl.credit": choice(tuple(Credit)),
    "rl.clip_low": SHARE,
    "rl.clip_high": NOT_NEGATIVE,
    "rl.clip_dual": NOT_NEGATIVE,
    "rl.objective": choice(tuple(Ratio)),
    "rl.advantage": choice(tuple(Baseline)),
    "rl.overlong": COUNT_OR_NONE,
    "rl.kl": choice(tuple(Divergence)),
    "rl.kl_in": choice(tuple(PenaltyIn)),
    "rl.kl_coef": NOT_NEGATIVE,
    "rl.reference_every": COUNT_OR_NONE,
    "rl.entropy_coef": NOT_NEGATIVE,
    "rl.max_logp_gap": POSITIVE,
    "rl.eval_every": COUNT_OR_NONE,
    "rl.eval_count": COUNT,
    "rl.trajectories_every": COUNT_OR_NONE,
    "rl.trajectories_gb": POSITIVE,
    "engine.kind": choice(tuple(EngineKind)),
    "engine.url": engine_address,
    "engine.key_variable": variable,
    "engine.in_flight": COUNT,
    "engine.timeout_seconds": POSITIVE,
    "engine.retries": Range(0, whole=True),
    "feedback.image": choice(tuple(FeedbackImage)),
    "feedback.render": text,
    "feedback.error": text,
    "reward.alpha": SHARE,
    "reward.beta": SHARE,
    "reward.gamma": NOT_NEGATIVE,
    "reward.eta": NOT_NEGATIVE,
    "reward.mode": choice(tuple(ScoreMode)),
    "reward.judge": choice(tuple(BackEnd)),
    "judge.question": choice(tuple(Asked)),
    "judge.url": address,
    "judge.model": name,
    "judge.key_variable": variable,
    "judge.in_flight": COUNT,
    "judge.timeout_seconds": POSITIVE,
    "judge.retries": COUNT_OR_NONE,
    "judge.path": place,
    "judge.batch_size": COUNT,
    "judge.prompt_length": COUNT,
    "judge.max_tokens": COUNT,
    "judge.max_failures": COUNT,
    "env.workers": Range(0, whole=True, because="0 runs all scripts on env.hosts"),
    "env.hosts": addresses,
    "env.secret": secret,
    "env.python": python,
    "env.dpi": COUNT,
    "env.wall_seconds": POSITIVE,
    "env.cpu_seconds": POSITIVE,
    "env.memory_mb": COUNT,
    "env.max_pixels": COUNT,
    "env.preload": words(),
    "env.cache_size": COUNT_OR_NONE,
    "env.feedback_chars": COUNT,
    "env.replay_share": SHARE,
    "env.bubblewrap": switch,
    "env.sandbox": choice(tuple(SandboxMode)),
    **{f"alarms.{monitor}": NOT_NEGATIVE for monitor in MONITORS},
    "eval.split": name,
    "eval.count": Range(0, whole=True, because="0 takes all"),
    "eval.batch_size": COUNT,
    "eval.turns": COUNT,
    "eval.remembered": Range(0, whole=True, because="0 remembers all"),
    "eval.sampled": switch,
    "eval.gallery_count": Range(0, whole=True, because="0 takes all"),
    "checkpoint.every": COUNT,
    "checkpoint.keep": COUNT,
    "checkpoint.grace_seconds": NOT_NEGATIVE,
    "checkpoint.keep_every": COUNT_OR_NONE,
    "checkpoint.best": text,
    "checkpoint.accept_changes": switch,
    "log.tensorboard": switch,
    "log.wandb": text,
}
# Fields that may be addresses in buckets.
IN_BUCKETS = tuple(field for field, check in FIELDS.items() if check is place)


def check_fields(config: ConfigDict) -> None:
    """Checks every field of a stage, of an evaluation, or of a pipeline with its stages.

    Raises:
      ConfigError: names the first field that cannot be what it is, its value and what it may be;
        or fields that the file of a configuration lacks or that nothing reads; or hosts that
        cannot be used; or the variable with a key that cannot be sent.
    """
    values = dict(_values(config))
    wanted = {field for field, _ in _values(load(config.stage, None))}
    lacking = sorted(wanted - set(values))
    if lacking:
        raise ConfigError(
            f"the configuration lacks {', '.join(lacking)}: take configs/{config.stage}.py as the "
            "pattern"
        )
    if unread := sorted(set(values) - wanted):
        raise ConfigError(f"nothing reads {', '.join(unread)} in {config.stage}: take it out")
    for field, value in values.items():
        check = _check_of(field)
        if check is not None:
            check(field, value)
    for field in values:
        if field.endswith("env.hosts"):
            of_hosts = (values[field.removesuffix("hosts") + n] for n in ("workers", "secret"))
            try:
                check_hosts(values[field], *of_hosts)
            except HostsError as problem:
                raise ConfigError(str(problem)) from problem
    judges = [value for field, value in values.items() if field.endswith("reward.judge")]
    if BackEnd.HTTP in judges:  # a pipeline would need it after hours only
        read_key(values["judge.key_variable"], "judge.key_variable")
    for field, value in values.items():
        if field.endswith("engine.kind") and value != EngineKind.SAMPLER:
            of_server = field.removesuffix("kind") + "key_variable"
            read_key(values[of_server], of_server)


def expected(field: str) -> str | None:
    """What a field may be, in words, where its type alone says much."""
    check = _check_of(field)
    if isinstance(check, Range):
        return str(check)
    said: dict[Check, str] = {
        switch: "true or false",
        buckets: "sizes that grow, such as (512, 1024)",
    }
    return None if check is None else said.get(check)


def _check_of(field: str) -> Check | None:
    # The sections of a pipeline's stages are below `stages.<stage>`.
    own = field.split(".", 2)[2] if field.startswith("stages.") else field
    return FIELDS.get(own)


def _values(config: ConfigDict) -> Iterator[tuple[str, Any]]:
    """(field, value) of all fields but sections."""
    for field in field_names(config):
        value: Any = config
        for part in field.split("."):
            value = value[part]
        if not isinstance(value, ConfigDict):
            yield field, value
