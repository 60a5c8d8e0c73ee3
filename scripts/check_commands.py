"""What is wrong with a command of the pages: its program, module, flags, fields or extras.

Flags are looked up in the sources: what a program, the modules that commands share and the module
of its `main` define. A word in capitals (DIR), `...` and `[...]` stand for what a reader fills in.
"""

import ast
import functools
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from mmrecoder_jax.config import SIZES, ConfigError, config_file, field_names, load, own_files

ROOT = Path(__file__).parents[1]
# They define flags for those that import them.
SHARED = ("mmrecoder_jax.cli", "mmrecoder_jax.command", "mmrecoder_jax.drawing.flags")
# Other people's programs: only that they are spelled so is known of them.
FOREIGN = {
    "ruff",
    "mypy",
    "mkdocs",
    "pre-commit",
    "hf",
    "vllm",
    "srun",
    "sbatch",
    "mpirun",
    "jupyter",
    "cd",
    "tee",
}
EXPERIMENT = "experiment"  # beside the scripts, and defines flags that they share
ANY_FIELD = "config.FIELD"  # an experiment hands fields on without a configuration of its own
TPU_VM = "tpu_vm.sh"  # what it hands on to the training command stands behind --
JUDGE = "serve_judge.sh"
OURS = {"python", "python3", "pip", "pytest", "gcloud", "source", ".ci/run", "git", TPU_VM, JUDGE}
BUILT_IN = {"help", "helpfull", "h", "traceback"}  # of the parsers
FOREIGN_FLAGS = {  # of programs that the pages start without naming them in the same words
    *("enable-deterministic-inference", "enable-scale-out", "logprobs-mode"),
    *("worker", "strict"),
}
ANY_SCRIPT = "script.py"
_FILL_IN = re.compile(r"\.\.\.|…|<.*>|(/?[A-Z][A-Z0-9_]*)([/:.\[].*)?$")


def program_name(word: str) -> str:
    """`.venv/bin/python` -> python."""
    return (
        word if word == ".ci/run" else re.sub(r"^python3\.\d+$", "python", os.path.basename(word))
    )


def simple_commands(command: str) -> Iterator[list[str]]:
    """The words of each command of a line (`a && b | c`), without what follows a `#`."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    for word in lexer:
        if word == "#":
            break
        if set(word) <= set("&|;"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def check_command(words: list[str]) -> Iterator[str]:
    """What is wrong with one command."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    if words[0].startswith("--"):
        yield from _check_flags_of_any(words)
        return
    program, rest = program_name(words[0]), words[1:]
    if program in ("python", "python3"):
        yield from _check_python_program(rest)
    elif program == "pip":
        yield from _check_extras(rest)
    elif program == "pytest":
        yield from _check_pytest(rest)
    elif program == "gcloud":
        for word in rest:
            if word.startswith("--command="):
                for inner in simple_commands(word.removeprefix("--command=")):
                    yield from check_command(inner)
    elif program == TPU_VM:
        own, train = _parted(rest)
        yield from _check_shell(program, own)
        if train:
            yield from _check_python_program(["-m", "mmrecoder_jax.train", *train])
    elif program == JUDGE:
        yield from _check_shell(program, _parted(rest)[0])
    elif program not in OURS | FOREIGN:
        yield f"no such program: {words[0]}"


def _parted(words: list[str]) -> tuple[list[str], list[str]]:
    """(what stands before --, what stands behind it)."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _check_shell(program: str, words: list[str]) -> Iterator[str]:
    known = _shell_flags(ROOT / "scripts" / program)
    yield from (
        f"{program} has no flag --{name}" for name, _ in flags_in(words) if name not in known
    )


@functools.cache
def _shell_flags(path: Path) -> frozenset[str]:
    """The flags that a shell script has a case for."""
    return frozenset(
        re.findall(r"^ +--([\w-]+)(?:=\??\*)?\)", path.read_text(encoding="utf-8"), re.M)
    )


def _check_python_program(words: list[str]) -> Iterator[str]:
    if not words or words[0] == "-c":
        return
    if words[0] != "-m":
        path = ROOT / words[0]
        if words[0] != ANY_SCRIPT and not _fill_in(words[0]) and not path.is_file():
            yield f"no such file: {words[0]}"
        elif path.is_file():
            yield from _check_flags(words[0], path, words[1:])
        return
    module, rest = words[1], words[2:]
    if module == "pytest":
        yield from _check_pytest(rest)
    elif module.split(".")[0] in ("mmrecoder_jax", "tests"):
        path = module_file(module)
        if path is None:
            yield f"no such module: {module}"
        else:
            yield from _check_flags(module, path, rest)
    elif module not in ("venv", "pip", "http.server"):
        yield f"no such module: {module}"


def module_file(module: str) -> Path | None:
    """The file that `python -m` runs."""
    path = ROOT.joinpath(*module.split("."))
    found = (path.with_suffix(".py"), path / "__main__.py")
    return next((file for file in found if file.is_file()), None)


def _check_flags(program: str, path: Path, words: list[str]) -> Iterator[str]:
    known = flags_of(path)
    config: str | None = None
    for name, value in flags_in(words):
        if name == "config":
            config = value
            if not _fill_in(value):
                yield from _check_config(program, value)
    fields = _fields_of(config)
    for name, value in flags_in(words):
        if name == "sweep" and "sweep" in known:
            field = value.partition("=")[0].removeprefix("config.")
            if field not in fields:
                yield _no_field(config, field)
        elif name.startswith("config."):
            if not {"config", ANY_FIELD} & known:
                yield f"{program} has no flag --{name}"
            elif name.removeprefix("config.") not in fields:
                yield _no_field(config, name.removeprefix("config."))
        elif name.removeprefix("no") not in known and name not in known | BUILT_IN:
            yield f"{program} has no flag --{name}"


def flags_in(words: list[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of the flags among the words, also of those in `[...]`."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        word = word.strip("[]")
        if word.startswith("--") and len(word) > 2:
            name, given, value = word[2:].partition("=")
            yield name, value if given else following


def _check_config(program: str, value: str) -> Iterator[str]:
    path, _, size = value.partition(":")
    try:
        name = Path(config_file(path if path in own_files() else str(ROOT / path))).stem
    except ConfigError as error:
        yield str(error)
        return
    if size and size not in SIZES and not _fill_in(size):
        yield f"--config={value}: no size {size}; there are {', '.join(SIZES)}"
    if (name == "evaluate") != program.endswith(".evaluate") and program.endswith(
        (".evaluate", ".train")
    ):
        yield f"--config={value}: {program} does not run it"


def _no_field(config: str | None, field: str) -> str:
    return f"{config} has no field {field}" if config else f"no configuration has a field {field}"


@functools.cache
def _fields_of(config: str | None) -> frozenset[str]:
    """The fields of a configuration, or of all of them."""
    name = Path((config or "").partition(":")[0]).stem
    names = [name] if name in own_files() else list(own_files())
    return frozenset(field for name in names for field in field_names(load(name, None)))


def _check_flags_of_any(words: list[str]) -> Iterator[str]:
    """Flags that the text names without their command: one of our programs has each."""
    known = all_flags()
    for name, value in flags_in(words):
        if name.startswith("config."):
            if name.removeprefix("config.") not in _fields_of(None):
                yield _no_field(None, name.removeprefix("config."))
        elif name == "config" and value and not _fill_in(value):
            yield from _check_config("", value)
        elif name.removeprefix("no") not in known and name not in known | FOREIGN_FLAGS:
            yield f"no program has a flag --{name}"


@functools.cache
def all_flags() -> frozenset[str]:
    """The flags of all our programs."""
    files = [*(ROOT / "mmrecoder_jax").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    return (
        frozenset(flag for path in files for flag in flags_of(path))
        | _shell_flags(ROOT / "scripts" / TPU_VM)
        | BUILT_IN
    )


@functools.cache
def flags_of(path: Path) -> frozenset[str]:
    """The flags that a program's sources define, for absl or argparse."""
    source = path.read_text(encoding="utf-8")
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            names = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
            if called.startswith("DEFINE_"):
                found |= set(names[:1])
            elif called in ("add_argument", "add"):
                found |= {name.lstrip("-") for name in names if name.startswith("-")}
        elif isinstance(node, ast.ImportFrom) and node.module == EXPERIMENT:
            found |= flags_of(path.with_name(f"{EXPERIMENT}.py"))
            found |= {ANY_FIELD} if any(name.name == "Flags" for name in node.names) else set()
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmrecoder_jax"):
            for module in _defining(str(node.module), [a.name for a in node.names], source):
                inner = module_file(module)
                if inner is not None and inner != path:
                    found |= flags_of(inner)
    return frozenset(found)


def _defining(module: str, names: list[str], source: str) -> set[str]:
    """Which of the modules of `from MODULE import NAMES` define flags for the program."""
    inside = {f"{module}.{name}" for name in names}
    called = {f"{module}.{name}" for name in names if f"{name}.main(" in source}
    return (inside | {module}) & set(SHARED) | called | ({module} if "main" in names else set())


def _check_extras(words: list[str]) -> Iterator[str]:
    known = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.M)
    for word in words:
        match = re.match(r"(?:\.|mmrecoder_jax)\[([\w,]+)\]", word)
        for extra in match[1].split(",") if match else ():
            if extra not in known:
                yield f"no such extra: {extra}; there are {', '.join(known)}"


def _check_pytest(words: list[str]) -> Iterator[str]:
    for word in words:
        if word.startswith("tests/") and not (ROOT / word.partition("::")[0]).exists():
            yield f"no such test: {word}"


def _fill_in(word: str) -> bool:
    """Whether a reader puts something of their own in this place."""
    return bool(_FILL_IN.match(word))
