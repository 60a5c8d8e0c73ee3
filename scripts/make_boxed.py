"""Makes the policy in the box anew, from the work directory of a finished pipeline.

    python -m mmrecoder_jax.train --config=configs/pipeline.py:tiny --workdir=runs/tiny
    python scripts/make_boxed.py --workdir=runs/tiny --commit=$(git rev-parse HEAD)

Writes `mmrecoder_jax/boxed/`, which is in every wheel:

    config.json model.safetensors ...    a Hugging Face directory (`models.export`), float32
    tokenizer.model
    mmrecoder.json                       how the policy was trained to be asked
    README.md                            the model card: command, commit, scores, limits

The scores of the card are those of the stage's evaluation.json. A commit is named where it is
given, and only where the files that trained the policy are those of that commit: the work directory
does not know it.
"""

import argparse
import datetime
import fnmatch
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from mmrecoder_jax.command import Parser, ending_in_one_line
from mmrecoder_jax.config import (
    SETTINGS_FILE,
    SHARED,
    STAGES,
    ConfigError,
    check_local_path,
    field_names,
    has_field,
    load,
    saved_field,
    saved_grammar,
)
from mmrecoder_jax.data.grammars import GRAMMARS, Grammar
from mmrecoder_jax.data.rows import json_object
from mmrecoder_jax.drawing.open import ASKED, BOXED, Who, author_config
from mmrecoder_jax.evaluation import table_rows
from mmrecoder_jax.learner.checkpoint import latest_step
from mmrecoder_jax.models.export import export_policy
from mmrecoder_jax.models.weights import to_tensors
from mmrecoder_jax.pipeline import part_config
from mmrecoder_jax.reporting.tables import table_markdown
from mmrecoder_jax.reporting.verdict import compared
from mmrecoder_jax.stage import build

ROOT = Path(__file__).parents[1]
MOST_BYTES = 8 << 20  # of the weights: every installation carries them


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a finished pipeline")
    parser.add_argument(
        "--stage", default="", help=f"one of {', '.join(STAGES)}; by default the last that is there"
    )
    parser.add_argument("--commit", default="", help="that trained the policy, where it is known")
    parser.add_argument("--out", default=BOXED, help="directory to write, by default the package's")
    args = parser.parse_args()
    with ending_in_one_line(args.traceback):
        stage = args.stage or last_stage(args.workdir)
        make(args.workdir, stage, known_commit(args.commit), args.out)
        print(f"{args.out}: the policy of {os.path.join(args.workdir, stage)}")


def known_commit(name: str) -> str:
    """The whole id of a commit of this checkout, "" for none.

    Raises:
      ConfigError: there is no such commit.
    """
    if not name:
        return ""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"--commit={name!r}: no commit of the checkout at {ROOT}")
    return done.stdout.strip()


def last_stage(workdir: str) -> str:
    """The last stage of the paper's order that was trained and evaluated."""
    check_local_path("--workdir", workdir)
    for stage in reversed(STAGES):
        if (Path(workdir) / stage / "evaluation.json").is_file():
            return stage
    raise ConfigError(f"--workdir={workdir!r}: no stage in it has an evaluation.json")


def make(workdir: str, stage: str, commit: str, out: str) -> None:
    """Writes the box, whole or not at all.

    Raises:
      ConfigError: no such stage, a policy of no grammar, or weights that are larger than a box may
        be.
    """
    source = os.path.join(workdir, stage)
    evaluation = Path(source) / "evaluation.json"
    if not evaluation.is_file():
        raise ConfigError(f"--stage={stage!r}: {evaluation} is missing; evaluate the stage first")
    saved = json_object(Path(source) / "config.json")
    if saved_grammar(saved) not in GRAMMARS:
        raise ConfigError(
            f"--workdir={workdir!r}: the stage was trained on charts of no grammar that the card "
            f"could describe; give a run with data.kind=synthetic and data.grammar one of "
            f"{', '.join(GRAMMARS)}"
        )
    config = author_config(Who(source))
    built = build(config, source)
    sizes, pixels = built.model.config, (config.processor.min_pixels, config.processor.max_pixels)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(out))) as made:
        tensors = to_tensors(built.initial_params(), sizes, jnp.dtype("float32"))
        system = config.processor.system
        export_policy(made, tensors, sizes, built.tokenizer, pixels, "float32", system=system)
        size = sum(path.stat().st_size for path in Path(made).glob("*.safetensors"))
        if size > MOST_BYTES:
            raise ConfigError(f"the weights have {size} bytes, a box at most {MOST_BYTES}")
        (Path(made) / SETTINGS_FILE).write_text(json.dumps(asked(config), indent=1) + "\n")
        rows = json.loads(evaluation.read_bytes())
        (Path(made) / "README.md").write_text(
            card(workdir, rows, stage, commit, latest_step(source), size), encoding="utf-8"
        )
        (weights,) = Path(made).glob("*.safetensors")  # of this size there is one file
        weights.rename(Path(made) / "model.safetensors")
        (Path(made) / "model.safetensors.index.json").unlink()
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
        os.chmod(out, 0o755)


def asked(config: ConfigDict) -> dict[str, Any]:
    """What `SETTINGS_FILE` holds: the size, and the fields that say how the policy is asked."""
    fields: dict[str, Any] = {"size": config.size}
    for name in ASKED:
        if has_field(config, name):
            value: Any = config
            for word in name.split("."):
                value = value[word]
            fields[name] = list(value) if isinstance(value, tuple) else value
    return fields | {"rl.turns": config.eval.remembered + 1}


def card(
    workdir: str,
    rows: list[dict[str, Any]],
    stage: str,
    commit: str,
    step: int | None,
    size: int,
) -> str:
    """The model card.

    Args:
      workdir: of the pipeline.
      rows: of the stage's evaluation.json.
      step: of the checkpoint.
      size: bytes of the weights.
    """
    saved = json_object(Path(workdir, stage, "config.json"))
    name = saved_grammar(saved)
    grammar = GRAMMARS[name]
    shown = [
        {name: value for name, value in row.items() if name not in ("policy", "refused")}
        for row in table_rows(rows)
    ]
    made = datetime.date.today().isoformat()
    trained = (
        f"commit {commit}" if commit else "a commit that was not noted, with the recipe of its time"
    )
    recipe = "the whole recipe of MM-ReCoder: two cold starts, two stages of RL"
    if stage != STAGES[-1]:
        recipe = f"the recipe of MM-ReCoder up to the stage {stage}"
    filled = CARD.format(
        recipe=recipe,
        stage=stage,
        step=step,
        seed=saved["seed"],
        trained=trained,
        made=made,
        size=f"{size / 2**20:.1f} MiB",
        commands="\n".join(f"    {line}" for line in commands(workdir, saved["size"])),
        grammar=name,
        description=grammar.DESCRIPTION,
        beyond=grammar.BEYOND,
        pixels=pixels_of(grammar),
        limits="\n".join(f"- {line}" for line in limits(saved, rows)),
        table="TABLE",
    )
    paragraphs = [
        line
        if line.startswith("    ")
        else textwrap.fill(line, 100, subsequent_indent=indent(line))
        for line in filled.splitlines()
    ]
    return "\n".join(paragraphs).replace("TABLE", table_markdown(shown)) + "\n"


def indent(line: str) -> str:
    """Of the lines that follow the first of a paragraph, or of an item of a list."""
    return "  " if line.startswith("- ") else ""


def pixels_of(grammar: Grammar) -> str:
    """The size of its charts."""
    inches, dpi = grammar.RC_PARAMS["figure.figsize"], grammar.RC_PARAMS["figure.dpi"]
    return " x ".join(f"{round(side * dpi)}" for side in inches)


def commands(workdir: str, size: str) -> list[str]:
    """What makes the box anew: a pipeline of this size, with the fields that its stages have
    otherwise; a command for each stage where they differ in a field that a pipeline has once.
    """
    pipeline = load("pipeline", size)
    parts = {name: part_config(pipeline, workdir, name, init_from="") for name in STAGES}
    changed = fields_of(workdir, parts)
    shared = [
        {name: value for name, value in fields.items() if is_shared(name)}
        for fields in changed.values()
    ]
    if all(values_agree(*pair) for pair in itertools.combinations(shared, 2)):
        flags = {
            name if is_shared(name) else f"stages.{stage}.{name}": values
            for stage, fields in changed.items()
            for name, values in fields.items()
        }
        lines = broken(f"train --config=configs/pipeline.py:{size}", "--workdir=runs/tiny", flags)
    else:
        lines = stage_commands(size, fields_of(workdir, {name: load(name, size) for name in parts}))
    return [*lines, "python scripts/make_boxed.py --workdir=runs/tiny --commit=COMMIT"]


def stage_commands(size: str, changed: dict[str, dict[str, tuple[Any, Any]]]) -> list[str]:
    """The stages one by one, then the evaluation of the last."""
    lines, before, charts = [], "", "--config.data.dir=runs/tiny/data"
    for stage, fields in changed.items():
        source = f"--config.init_from={before}" if before else ""
        before = f"runs/tiny/{stage}"
        program = f"train --config=configs/{stage}.py:{size}"
        lines += broken(program, f"--workdir={before}", fields, source, charts)
    source = f"--config.init_from={before}"
    program = f"evaluate --config=configs/evaluate.py:{size}"
    return lines + broken(program, f"--workdir={before}", {}, source, charts)


def broken(program: str, workdir: str, fields: dict[str, tuple[Any, Any]], *more: str) -> list[str]:
    """A command in lines of less than 100 characters."""
    flags = [workdir, *filter(None, more)]
    for name, (usual, value) in fields.items():
        if value != usual:
            shown = tuple(value) if isinstance(value, list) else value
            flags.append(shlex.quote(f"--config.{name}={shown}"))
    lines = [f"python -m mmrecoder_jax.{program}"]
    for flag in flags:
        if len(lines[-1]) + len(flag) < 92:
            lines[-1] += f" {flag}"
        else:
            lines[-1] += " \\"
            lines.append(f"    {flag}")
    return lines


def is_shared(field: str) -> bool:
    """Whether a pipeline has a field once for all of its stages."""
    return field == "seed" or field.partition(".")[0] in SHARED


def values_agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the fields that two stages know have the same values."""
    return all(one[name][1] == other[name][1] for name in one.keys() & other.keys())


def fields_of(workdir: str, parts: dict[str, ConfigDict]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """The fields that decide the policy, for each stage in the work directory: what `parts` have,
    and what the stage has.
    """
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for stage, part in parts.items():
        path = Path(workdir, stage, "config.json")
        if not path.is_file():
            continue
        saved, usual = json_object(path), json.loads(part.to_json_best_effort())
        found[stage] = {}
        for field in field_names(part):
            value = saved_field(saved, field)
            if isinstance(value, dict | None) or any(fnmatch.fnmatch(field, p) for p in FREE):
                continue
            found[stage][field] = (saved_field(usual, field), value)
    return found


def limits(saved: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """What the scores say of what it cannot do."""
    found = []
    for name in dict.fromkeys(row["set"] for row in rows):
        scores = [
            f"{100 * row['low_level']:.1f}"
            for row in rows
            if (row["set"], row["decoding"]) == (name, "greedy")
        ]
        found.append(f"Low-level scores of turns 1, 2, ... on {name} charts: {', '.join(scores)}.")
    if "turns" in saved.get("rl", {}):
        found[0] += f" It was trained on {saved['rl']['turns']} turns."
    gains = [row for row in rows if row["turn"] == 2 and "improvement" in row]
    said = [compared(row["improvement_ci"], HELPS, HARMS, NO_SIGN) for row in gains]
    for text in (HELPS, NO_SIGN, HARMS):
        listed = [gain(row) for row, verdict in zip(gains, said, strict=True) if verdict == text]
        if listed:
            found.append(f"{text}: {'; '.join(listed)}.")
    return found


def gain(row: dict[str, Any]) -> str:
    """What turn 2 does to turn 1, in points."""
    low, high = (100 * bound for bound in row["improvement_ci"])
    mean = 100 * row["improvement"]
    return f"{row['set']} charts, {row['decoding']}, {mean:+.1f} [{low:+.1f}, {high:+.1f}]"


# By the 95 % interval of what turn 2 does to turn 1: above zero, around it, below.
HELPS = "A second turn helps"
NO_SIGN = "There is no sign that a second turn helps or harms"
HARMS = "A second turn harms"

# Fields that say where and how fast a run goes, not what comes of it; patterns.
FREE = (
    *("stage", "size", "init_from", "data.dir", "data.gallery", "data.dialogues", "mesh.*"),
    *("data.val_count", "data.test_count"),  # training sees none of them
    *("env.workers", "env.hosts", "env.secret", "env.python", "env.sandbox", "model.attention"),
    *(
        "train.log_every",
        "train.eval_*",
        "checkpoint.*",
        "log.*",
        "alarms.*",
        "rl.eval_*",
        "rl.trajectories_*",
    ),
)

# One line for each paragraph: `card` breaks them.
CARD = """# The policy in the box

A Qwen2.5-VL of about one million parameters, trained from scratch on toy charts by {recipe}. \
With it `python -m \
mmrecoder_jax.generate` does something true right after an installation. It is no chart-to-code \
model for work: give a checkpoint or a server for that.

- stage: {stage}, step {step}, seed {seed}
- trained by: {trained}
- put into the box: {made}
- weights: float32, {size}; licence Apache-2.0, as are the charts it has seen
- made anew by

{commands}

## What it can draw

Charts of the grammar that it was trained on (`data.grammar={grammar}`, `docs/data.md`): \
{description}. Its scripts are drawn in the house style of those charts, {pixels} pixels. Run by \
themselves they have Matplotlib's own style.

## Scores

Values are percent: ChartMimic low-level in training mode; a script that does not execute scores \
0. Brackets are 95 % bootstrap intervals over charts. Improvement, improved, regressed and repeat \
compare with turn 1, over charts whose first turn executes. The gallery, where it is there, has \
examples of Matplotlib that nobody here wrote.

{table}

## Limits

- It answers with charts of its grammar whatever it is shown. Beyond it are {beyond}; and 3-D and \
photographs.
- It reads letters as the Matplotlib release of its training charts draws them. Charts of another \
release may cost it words (`docs/results.md`).
{limits}
"""


if __name__ == "__main__":
    sys.exit(main())
