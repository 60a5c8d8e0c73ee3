"""Opening an author by what a user names: nothing (the policy in the box), a directory, a server.

    checkpoint=""                the policy in the box
    checkpoint=runs/tiny/stage2  a work directory of a stage; @best and @120 name its checkpoints
    checkpoint=exported          a Hugging Face directory of Qwen2.5-VL, exported or published
    server=http://host/v1        a model behind an OpenAI-compatible server

How an author is asked (instruction, feedback, sizes, the style of its renders) is a configuration
like that of an evaluation. A work directory brings its own in config.json, and so does a directory
with `SETTINGS_FILE`; any other is asked as the paper asks its policy.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mmrecoder_jax import places
from mmrecoder_jax.config import (
    PUBLISHED,
    SETTINGS_FILE,
    STAGES,
    ConfigError,
    check_place,
    has_field,
    load,
    naming,
    saved_field,
    saved_grammar,
    set_fields,
    work_directory,
)
from mmrecoder_jax.data.rows import json_object
from mmrecoder_jax.drawing.authors import Author
from mmrecoder_jax.drawing.policy import PolicyAuthor
from mmrecoder_jax.drawing.server import KEY_VARIABLE, ServerAuthor
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.learner.checkpoint import split_source
from mmrecoder_jax.learner.init import source_digest
from mmrecoder_jax.models.published import load_config
from mmrecoder_jax.rl.judge.base import Judge, VerdictCache
from mmrecoder_jax.rl.judge.http import HttpJudge, Server
from mmrecoder_jax.rl.web import check_address, check_variable
from mmrecoder_jax.stage import build, env_config

JUDGE_KEY = "MMRECODER_JUDGE_KEY"  # environment variable that holds the judge's key
BOXED = str(Path(__file__).parents[1] / "boxed")  # the directory of the policy in the box
# Fields that say how a policy is asked, which its training decides; in `SETTINGS_FILE` beside size.
ASKED = (
    *("model.dtype", "model.param_dtype", "model.scan_unroll"),
    *("processor.min_pixels", "processor.max_pixels", "processor.system"),
    *("data.kind", "data.grammar", "data.instruction", "data.windows"),
    *("rl.turns", "rl.prompt_length", "rl.feedback_length", "rl.response_length"),
    "rl.decode_chunk",
    *("feedback.image", "feedback.render", "feedback.error"),
    *("env.dpi", "env.wall_seconds", "env.cpu_seconds", "env.memory_mb", "env.max_pixels"),
    *("env.preload", "env.feedback_chars"),
)


@dataclasses.dataclass(frozen=True)
class Who:
    """Whom a user names.

    Attributes:
      checkpoint: a directory; "" with an empty `server`: the policy in the box.
      server: address of an OpenAI-compatible server, such as "http://localhost:8000/v1".
      model: the name the server knows its model by.
      key_variable: environment variable that holds the server's key; no key is sent if it is unset.
      timeout_seconds: for one answer of a server.
      max_tokens: the longest answer of a server.
      in_flight: conversations with a server at one time.

    Raises:
      ConfigError: a server without a model, or with a checkpoint.
    """

    checkpoint: str = ""
    server: str = ""
    model: str = ""
    key_variable: str = KEY_VARIABLE
    timeout_seconds: float = 600.0
    max_tokens: int = 4096
    in_flight: int = 8

    def __post_init__(self) -> None:
        if self.server and self.checkpoint:
            raise ConfigError(
                f"--server={self.server!r} and --checkpoint={self.checkpoint!r}: give one of them"
            )
        if self.server and not self.model:
            raise ConfigError(
                f"--server={self.server!r} needs --model=NAME, the name the server knows it by"
            )
        if self.model and not self.server:
            raise ConfigError(f"--model={self.model!r} needs --server=URL, where that model is")
        if self.server:
            check_address("--server", self.server, variable="--key-variable")
            check_variable("--key-variable", self.key_variable)

    @property
    def name(self) -> str:
        """What people call it."""
        if self.server:
            return self.model
        if not self.checkpoint:
            return "the policy in the box"
        return os.path.basename(os.path.normpath(self.checkpoint))


@contextlib.contextmanager
def open_author(
    who: Who,
    *,
    config: ConfigDict | None = None,
    env: ChartEnv | None = None,
    judge: Judge | None = None,
    batch_size: int = 16,
) -> Iterator[Author]:
    """An author, as a context manager.

    Args:
      config: of `author_config(who)`, perhaps with other values.
      env: what executes its code; None: one of its own, which ends with it.
      judge: judges every render.
      batch_size: trajectories of a policy at one time.

    Raises:
      ConfigError: there is no such author, or it cannot be read; the message names the flag.
    """
    config = author_config(who) if config is None else config
    with contextlib.ExitStack() as exits:
        if env is None:
            env = exits.enter_context(ChartEnv(env_config(config)))
        if who.server:
            server = Server(
                who.server,
                who.model,
                who.key_variable,
                who.in_flight,
                who.timeout_seconds,
                retries=4,
                max_tokens=who.max_tokens,
            )
            feedback, mode = config.feedback.to_dict(), config.reward.mode
            yield exits.enter_context(ServerAuthor(server, env, feedback, mode, judge))
            return
        with naming("--checkpoint"):
            stage = build(config, config.init_from)
            params = stage.initial_params()
        yield PolicyAuthor(who.name, stage, params, env, judge, batch_size)


def open_judge(url: str, model: str) -> Judge:
    """A judge behind an OpenAI-compatible server, whose key is in `MMRECODER_JUDGE_KEY`; a context
    manager.

    Raises:
      ConfigError: an address that is none, or a key that cannot be sent.
    """
    check_address("--judge", url, variable=JUDGE_KEY)
    server = Server(url, model, JUDGE_KEY, 8, timeout_seconds=120.0, retries=4, max_tokens=512)
    remedy = f"check --judge, --judge-model and the key in {JUDGE_KEY}"
    return HttpJudge(server, VerdictCache(), max_failures=8, remedy=remedy)


def settings_of(who: Who, config: ConfigDict) -> dict[str, Any]:
    """What decides an author's answers besides the charts, as JSON can hold it.

    Args:
      config: of `author_config`.
    """
    if who.server:
        return {"author": who.model, "server": who.server, "max_tokens": who.max_tokens}
    remembered = config.eval.remembered
    return {
        "author": who.name,
        "weights": source_digest(config.init_from),
        **({"remembered": remembered} if remembered else {}),
    }


def keep_programs() -> None:
    """Has JAX keep what it compiles in this user's cache, where nobody has chosen another place: a
    second start then compiles nothing.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        directory = os.path.join(cache, "mmrecoder_jax", "programs")
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def author_config(who: Who) -> ConfigDict:
    """The configuration of an evaluation of this author: `open_author` reads it.

    Where a policy of its size remembers its latest turns alone, they are as many as in its
    training, and at least one.

    Raises:
      ConfigError: no policy is there.
    """
    if who.server:
        return load("evaluate", "paper")
    source = who.checkpoint or BOXED
    check_place("--checkpoint", source)
    with naming("--checkpoint"):
        source = places.local(source)
    saved = _saved(source)
    config = load("evaluate", saved.get("size", "paper"))
    fields = {
        name: _tuple(value) for name in ASKED if (value := saved_field(saved, name)) is not None
    }
    if grammar := saved_grammar(saved):
        fields["data.grammar"] = grammar
    set_fields(config, {name: value for name, value in fields.items() if has_field(config, name)})
    if config.eval.remembered and (turns := saved_field(saved, "rl.turns")):
        config.eval.remembered = max(1, turns - 1)
    config.init_from = source
    config.model.preset = PUBLISHED
    return config


def _saved(source: str) -> dict[str, Any]:
    """What a directory says of how its policy was trained: sections, or names with dots."""
    workdir = work_directory(source)
    if places.has_checkpoints(workdir):
        with naming("--checkpoint"):
            split_source(source)
        return json_object(Path(workdir) / "config.json")
    if not os.path.isdir(source):
        raise ConfigError(
            f"--checkpoint={source!r}: no such directory; give a work directory of a stage, or a "
            "Hugging Face directory of Qwen2.5-VL (`hf download NAME --local-dir DIR`)"
        )
    inside = [name for name in STAGES if places.has_checkpoints(os.path.join(source, name))]
    if inside:
        raise ConfigError(
            f"--checkpoint={source!r} holds several policies: give one, such as "
            f"{os.path.join(source, inside[-1])}"
        )
    with naming("--checkpoint"):
        load_config(source)
    settings = Path(source) / SETTINGS_FILE
    return json_object(settings) if settings.is_file() else {}


def _tuple(value: Any) -> Any:
    """JSON has lists where configurations have tuples."""
    return tuple(value) if isinstance(value, list) else value
