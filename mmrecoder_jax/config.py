"""Reading the configurations in `configs/`: their sizes, their fields, and what is wrong with one.

A configuration is one Python file per stage; the folder is beside the package in a checkout and
inside it where it is installed. It shows every field of that stage with the paper's
value, and lists what `:tiny` and `:smoke` change. Every field is an absl flag
(`--config.optim.lr=1e-5`). A stage has only the fields it uses; any other field is refused with
the stages that have it.
"""

import contextlib
import difflib
import hashlib
import os
import re
import runpy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmrecoder_jax import places
from mmrecoder_jax.models.adapters import base_of, holds_adapters
from mmrecoder_jax.models.config import PRESETS, LoraConfig, ModelConfig, preset
from mmrecoder_jax.models.files import CheckpointError
from mmrecoder_jax.models.hub import local_directory
from mmrecoder_jax.models.published import load_config, read_config

SIZES = ("paper", "tiny", "smoke")
STAGES = ("sft_chart2code", "sft_self_correction", "stage1", "stage2")  # the paper's order
RL_STAGES = ("stage1", "stage2")
ALIKE = 0.7  # from which ratio of difflib a field is suggested for one that there is not
# Sections that several stages have, and that a pipeline sets once for all of them.
SHARED = (
    *("model", "lora", "processor", "mesh", "data"),
    *("feedback", "judge", "env", "eval", "log"),
)
# Fields of config.model that the preset does not decide.
MODEL_SWITCHES = ("dtype", "param_dtype", "remat", "attention", "scan_unroll")
# The value of `model.preset` for sizes that the weights at `init_from` bring with them.
PUBLISHED = "published"
# In a work directory: the model's sizes, in the form of a published config.json.
SIZES_FILE = "model.json"
# In a Hugging Face directory of ours: how its policy is asked, fields by dotted name.
SETTINGS_FILE = "mmrecoder.json"
# In an exported directory: every field of the stage.
TRAINING_FILE = "training_config.json"
# What a process ends with that SIGTERM has ended before it could save (128 + the signal).
KILLED = 143
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_LOCAL = (
    "a local path is needed. Copy the files to this machine, or mount the bucket as a folder and "
    "give that (gcsfuse, s3fs, `hf download`)"
)
_PLACES = (
    "use a folder in a bucket, gs://BUCKET/PATH, or a local path, such as one that other storage "
    "is mounted at (gcsfuse, s3fs) or copied to (`hf download`)"
)


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the field and the remedy, and is all that
    a user needs to see.
    """


class Preempted(BaseException):
    """SIGTERM asked the process to end (`learner.preemption`); the message says where the same
    command goes on.
    """

    status = 75  # of the process: EX_TEMPFAIL of sysexits.h, try again later


def sized(
    config: ConfigDict, size: str | None, tiny: Mapping[str, Any], smoke: Mapping[str, Any]
) -> ConfigDict:
    """The paper's configuration in the size that was asked for behind the colon.

    Args:
      config: every field of a stage with the paper's value.
      size: "paper" (or None), "tiny" or "smoke".
      tiny: what `:tiny` changes, by dotted name: `{"optim.lr": 2e-3}`.
      smoke: what `:smoke` changes on top of `:tiny`.

    Raises:
      ValueError: there is no such size.
    """
    size = size or "paper"
    if size not in SIZES:
        raise ValueError(f"no size {size!r} (the part after ':'); there are: {', '.join(SIZES)}")
    config.size = size
    if size != "paper":
        set_fields(config, tiny)
    if size == "smoke":
        set_fields(config, smoke)
    return config


def set_fields(config: ConfigDict, fields: Mapping[str, Any]) -> None:
    """Sets fields by dotted name; raises KeyError for a field that does not exist."""
    for name, value in fields.items():
        section, last = config, name
        while "." in last:
            first, last = last.split(".", 1)
            section = section[first]
        if last not in section:
            raise KeyError(suggest(name, config))
        section[last] = value


def load(name: str, size: str | None) -> ConfigDict:
    """`get_config(size)` of one of our own configurations.

    Raises:
      ConfigError: there is none of this name.
    """
    path = own_files().get(name)
    if path is None:
        raise ConfigError(f"no configuration {name!r}; {_nearest(name)}")
    return runpy.run_path(path)["get_config"](size)


def own_files() -> dict[str, str]:
    """The files of `configs/`, by name: `stage2`."""
    package = Path(__file__).resolve().parent
    folders = package / "configs", package.with_name("configs")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise ConfigError(f"no configs/ in or beside {package}: install the package again")
    return {path.stem: str(path) for path in sorted(folder.glob("*.py"))}


def config_file(path: str) -> str:
    """The file that `--config` names: a path, or one of ours by its name (`stage2`).

    Raises:
      ConfigError: there is no such file; the nearest names are in the message.
    """
    check_local_path("--config", path)
    own = own_files()
    if path in own:
        return own[path]
    if not os.path.isfile(path):
        name = os.path.basename(path).removesuffix(".py")
        raise ConfigError(f"--config={path}: no such file; {_nearest(name)}")
    return path


def _nearest(name: str) -> str:
    """What a missing configuration is answered with."""
    own = own_files()
    near = difflib.get_close_matches(name, own, n=2)
    known = f"a file, or one of {', '.join(own)}, with :tiny or :smoke behind it"
    if not near:
        return f"give {known}"
    return f"did you mean {' or '.join(f'--config={found}' for found in near)}? Give {known}"


def has_field(config: ConfigDict, field: str) -> bool:
    """Whether a configuration has the field of this dotted name."""
    section: Any = config
    for name in field.split("."):
        if not isinstance(section, ConfigDict) or name not in section:
            return False
        section = section[name]
    return True


def field_names(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from field_names(value, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def suggest(field: str, config: ConfigDict) -> str:
    """The message for a field that a configuration does not have.

    Names the stages that use the field where there are any; otherwise the nearest names.
    """
    elsewhere = [
        name for name in (*STAGES, "evaluate", "pipeline") if has_field(load(name, None), field)
    ]
    if elsewhere:
        return f"{config.stage} does not use config.{field}; used by: {', '.join(elsewhere)}"
    names = list(field_names(config))
    near = _alike(field, names)
    top = [name for name in names if "." not in name]
    hint = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(top)}"
    return f"no such field: config.{field}; {hint}"


def _alike(field: str, names: Sequence[str]) -> list[str]:
    """Fields of the same name in other sections; else at most three that are alike, the most alike
    first.

    >>> names = ["rl", "rl.group", "reward.eta", "reward.beta", "optim.lr"]
    >>> _alike("rl.eta", names), _alike("rl.eata", names), _alike("mesh.data", names)
    (['reward.eta'], ['reward.eta', 'reward.beta'], [])
    """

    def last(name: str) -> str:
        return name.rpartition(".")[2]

    def alike(name: str) -> float:
        whole = difflib.SequenceMatcher(None, field, name).ratio()
        return max(whole, difflib.SequenceMatcher(None, last(field), last(name)).ratio())

    same = [name for name in names if last(name) == last(field)]
    found = sorted((name for name in names if alike(name) >= ALIKE), key=alike, reverse=True)
    return same or found[:3]


def check_choice(field: str, value: str, choices: Collection[str]) -> None:
    """Raises ConfigError where a field's value is not one of its choices."""
    if value not in choices:
        raise ConfigError(f"{field}={value!r}: use one of {', '.join(choices)}")


def check_local_path(name: str, path: str, instead: str = _LOCAL) -> None:
    """Raises ConfigError for an address (gs://, s3://, https://) or a `~` that no shell replaced.

    A local folder named "gs:" would be made of it.

    Args:
      name: the flag or field that the path is from.
      instead: what to give in place of an address.
    """
    if _ADDRESS.match(path):
        raise ConfigError(f"{name}={path!r}: {instead}")
    if path.startswith("~"):
        raise ConfigError(f"{name}={path!r}: no shell has replaced '~'; write $HOME, or all of it")
    if "\0" in path:
        raise ConfigError(f"{name}={path!r}: no path has a NUL character")


def check_place(name: str, path: str) -> None:
    """Raises ConfigError for what is neither a local path nor a folder in a bucket that this
    installation can read (`places`). Asks no bucket.

    Args:
      name: the flag or field that the path is from.
    """
    if not places.is_address(path):
        check_local_path(name, path, _PLACES)
        return
    try:
        places.check(name, path)
    except places.BucketError as error:
        raise ConfigError(str(error)) from error


def derived_seed(config: ConfigDict, purpose: str) -> int:
    """A seed of 31 bits that depends on `config.seed`, the stage and the purpose.

    Stages of one seed differ in the order of their data and in their noise, and no two purposes
    share random numbers.
    """
    text = f"{config.seed} {config.stage} {purpose}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def check_port(port: int) -> None:
    """Raises ConfigError for what is no port to serve on; 0 stands for a free one."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port={port}: use 1 to 65535, or 0 for a free one")


def check_output(name: str, path: str) -> None:
    """Raises ConfigError for a path at which nothing can be made: no local one, below a file, or in
    a place that cannot be written to.

    Args:
      name: the flag that the path is from.
    """
    _check_place(name, path, os.path.dirname(os.path.abspath(path)))


def check_output_dir(name: str, path: str) -> None:
    """Raises ConfigError for a path that is no directory that can be written to or made."""
    _check_place(name, path, os.path.abspath(path))


def _check_place(name: str, path: str, place: str) -> None:
    check_local_path(name, path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ConfigError(f"{name}={path!r}: {place} is no directory; name another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name}={path!r}: {place} cannot be written to; name a place that this user may "
            "write to"
        )


def saved_field(saved: Mapping[str, Any], name: str) -> Any:
    """A field of a saved configuration by its dotted name, None where it has none.

    Args:
      saved: sections, as of a config.json, or fields by dotted name.
    """
    if name in saved:
        return saved[name]
    section: Any = saved
    for word in name.split("."):
        if not isinstance(section, Mapping):
            return None
        section = section.get(word)
    return section


def saved_grammar(saved: Mapping[str, Any]) -> str:
    """The grammar of a saved configuration's charts; "" where it does not say that they are
    synthetic.
    """
    if saved_field(saved, "data.kind") != "synthetic":
        return ""
    # Versions with one grammar had no such field.
    return str(saved_field(saved, "data.grammar") or "words")


def data_dir(config: ConfigDict, workdir: str) -> str:
    """Where the chart directories are: `data.dir`, or `<workdir>/data`."""
    return config.data.dir or os.path.join(workdir, "data")


def lora_config(section: Mapping[str, Any] | ConfigDict) -> LoraConfig:
    """The `lora` section of a configuration, or of a saved config.json."""
    return LoraConfig(section["rank"], float(section["alpha"]), tuple(section["targets"]))


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Turns what is wrong with the files that a field names into a ConfigError that names it."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        raise ConfigError(f"{field}: {error}") from error


def model_config(config: ConfigDict) -> ModelConfig:
    """The preset, or the published sizes, with the configured types, switches and adapters.

    Raises:
      ConfigError: a name or a size that does not exist.
    """
    section = config.model
    # An evaluation has no backward pass, so its configuration does not have `remat`.
    switches = {name: section[name] for name in MODEL_SWITCHES if name in section}
    try:
        sizes = _published_sizes(config) if section.preset == PUBLISHED else preset(section.preset)
        return replace(sizes, **switches, lora=lora_config(config.lora))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _published_sizes(config: ConfigDict) -> ModelConfig:
    """The sizes that come with `init_from`: a work directory's or a Hugging Face directory's."""
    source = config.init_from
    if not source:
        raise ConfigError(
            f"model.preset={PUBLISHED!r} with an empty config.init_from: the sizes are read from "
            f"there; give a directory, or one of the presets {', '.join(PRESETS)}"
        )
    with naming("init_from"):
        kept = os.path.join(work_directory(source), SIZES_FILE)
        if os.path.isfile(kept):
            return read_config(Path(kept))
        return load_config(weights_directory(source))


def work_directory(source: str) -> str:
    """DIR of `DIR@best` and of `DIR@120`, which name a checkpoint of a work directory; any other
    source, and a path that exists, as it is.
    """
    workdir, _, _ = source.rpartition("@")
    named = workdir and not os.path.exists(source)
    return workdir if named and places.has_checkpoints(workdir) else source


def weights_directory(source: str) -> str:
    """The directory that holds the weights of `init_from`: itself, or where it is a directory of
    PEFT, that of the weights that it adapts. A model of the hub is downloaded if need be.

    Raises:
      CheckpointError, FileNotFoundError: the hub does not give it, or adapters name no weights.
    """
    source = local_directory(source)
    return local_directory(base_of(source)) if holds_adapters(source) else source
