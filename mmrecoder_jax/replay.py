"""`python -m mmrecoder_jax.replay --workdir=runs/tiny --id=stage2/trajectories/21/3`

Samples a written trajectory of RL again, and says whether the same came out: tokens, pixels,
rewards. Prints a table and exits with 0 where all is the same, else with 1. Where tokens differ it
names the first that does, and says whether rounding explains it.

A trajectory's tokens follow from its chart, the policy, the step's key and the numbers of the group
and of the member in it. All but the policy are in its row; the policy must be a checkpoint that is
kept. Therefore a stage also writes the rollouts that come right after a checkpoint, whatever
`rl.trajectories_every` says. The id is "<directory>/<step>/<number>", as the report shows it. The
work directory may be in a bucket.
"""

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from mmrecoder_jax import cli, places, stage
from mmrecoder_jax.command import Parser, ending_in_one_line
from mmrecoder_jax.config import (
    RL_STAGES,
    ConfigError,
    check_place,
    data_dir,
    field_names,
    load,
    saved_grammar,
    work_directory,
)
from mmrecoder_jax.data.rows import json_object
from mmrecoder_jax.data.sources import Chart, ChartDirectory
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.images import decode
from mmrecoder_jax.learner.checkpoint import digests_of, kept_steps
from mmrecoder_jax.learner.init import params_at, source_digest
from mmrecoder_jax.models.sharding import AXES
from mmrecoder_jax.reporting.tables import format_table
from mmrecoder_jax.rl.learner_batch import updates_per_step
from mmrecoder_jax.rl.rewards import RewardConfig, rewards_of
from mmrecoder_jax.rl.rollout import trajectories
from mmrecoder_jax.rl.sampler import noise
from mmrecoder_jax.rl.trajectory import MODES, Origin, Trajectory, Turn

WRITTEN = "trajectories"  # the directory of a stage's rollouts
REWARD_MARGIN = 1e-6
# Nats that rounding may move a token by, whatever the tokens before it say; written
# log-probabilities have four digits.
ROUNDING = 1e-3


@dataclasses.dataclass(frozen=True)
class Found:
    """A written trajectory.

    Attributes:
      row: of its file.
      workdir: of its stage.
      step: of the stage, that it was written in.
    """

    row: dict[str, Any]
    workdir: Path
    step: int

    @property
    def pictures(self) -> Path:
        return self.workdir / WRITTEN / "renders"


def find(workdir: str, name: str) -> Found:
    """The trajectory of an id.

    Raises:
      ConfigError: there is none; says what there is.
    """
    match = re.fullmatch(r"(?:(.+)/)?([\w.-]+)/(\d+)/(\d+)", name)
    if match is None:
        raise ConfigError(
            f"--id={name!r}: an id is <directory>/<step>/<number>, such as "
            f"stage2/{WRITTEN}/21/3; the report shows it"
        )
    above, directory, step, number = match[1] or "", match[2], int(match[3]), int(match[4])
    if directory != WRITTEN:
        raise ConfigError(
            f"--id={name!r}: only rollouts of training are sampled again, those in "
            f"<stage>/{WRITTEN}/"
        )
    place = Path(workdir) / above
    path = place / WRITTEN / f"{step:06d}.jsonl"
    if not path.is_file():
        steps = [int(file.stem) for file in sorted(path.parent.glob("*.jsonl"))]
        raise ConfigError(f"--id={name!r}: no {path}; there are {_listed(steps, 'steps')}")
    lines = path.read_text(encoding="utf-8").splitlines()
    if number >= len(lines):
        raise ConfigError(f"--id={name!r}: {path} has the numbers 0 to {len(lines) - 1}")
    return Found(json.loads(lines[number]), place, step)


def saved_config(workdir: Path) -> ConfigDict:
    """The configuration that a stage was run with; a field of a later version has its default."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: is {workdir} the work directory of a stage?")
    saved = json_object(path)
    if saved.get("stage") not in RL_STAGES:
        raise ConfigError(f"{path} is of {saved.get('stage')!r}, which has no rollouts")
    config = load(saved["stage"], saved.get("size"))
    for field in field_names(config):
        section, last = config, field
        old: Any = saved
        while "." in last and isinstance(old, dict):
            first, last = last.split(".", 1)
            section, old = section[first], old.get(first)
        if isinstance(old, dict) and last in old and not isinstance(section[last], ConfigDict):
            is_tuple = isinstance(section[last], tuple)
            section[last] = tuple(old[last]) if is_tuple else old[last]
    config.data.grammar = saved_grammar(saved) or config.data.grammar
    config.data.dir = _moved(config.data.dir, workdir)
    config.init_from = _moved(config.init_from, workdir)
    config.env.workers = 1
    return config


def origin_of(found: Found, config: ConfigDict) -> tuple[Origin, int]:
    """What decided a trajectory's tokens, and its number in its group.

    Raises:
      ConfigError: it cannot be sampled again; says why.
    """
    row = found.row.get("origin")
    if row is None:
        raise ConfigError(
            f"step {found.step} was written by a version that did not keep what decides tokens"
        )
    if config.engine.kind != "sampler":
        raise ConfigError(
            f"engine.kind={config.engine.kind!r}: a server sampled this, with random numbers of "
            "its own"
        )
    mesh = tuple(row.get("mesh", ()))  # rows of earlier versions have none
    origin = Origin(row["uid"], tuple(row["policies"]), tuple(row["key"]), mesh)
    first, last = origin.policies
    if first != last:
        raise ConfigError(
            f"this trajectory was written in parts, by the policies after the updates {first} to "
            f"{last} (rl.partial): it cannot be sampled at once"
        )
    return origin, row["member"]


def policy_of(origin: Origin, found: Found, built: stage.Stage) -> Any:
    """The parameters that a trajectory was sampled with.

    Raises:
      ConfigError: they are not kept; says which are, and what can be sampled again.
    """
    policy, config = origin.policies[0], built.config
    if policy == 0:
        return built.initial_params()
    kept = [step // updates_per_step(config.rl) for step in kept_steps(str(found.workdir))]
    if policy not in kept:
        files = (found.workdir / WRITTEN).glob("*.jsonl")
        again = sorted({int(file.stem) for file in files} & {step + 1 for step in (0, *kept)})
        raise ConfigError(
            f"the policy of step {found.step} is that after step {policy}, whose checkpoint is not "
            f"kept: there are {_listed(kept, 'checkpoints of step')} (checkpoint.keep="
            f"{config.checkpoint.keep}). Of what was written, "
            f"{_listed(again, 'trajectories of step')} can be sampled again"
        )
    step = policy * updates_per_step(config.rl)
    where = built.mesh, str(found.workdir), step
    return params_at(config, built.model.config, *where, built.trained)


def use_mesh(config: ConfigDict, origin: Origin, devices: int) -> str:
    """Lays the devices out as they were; where there are more or fewer, cuts the policy over all.

    Returns:
      A sentence where that may be another mesh than the trajectory was sampled on, else "".
    """
    mesh = config.mesh
    if origin.mesh:
        mesh.data, mesh.fsdp, mesh.tensor = origin.mesh
    axes = mesh.data, mesh.fsdp, mesh.tensor
    if math.prod(axes) == devices:
        return ""
    if -1 in axes and devices % -math.prod(axes) == 0:  # of a row of an earlier version
        return f"on how many devices it was sampled is not in its row; here it is {devices}"
    mesh.update({"data": 1, "fsdp": -1, "tensor": 1, "slices": 1})
    was = ", ".join(f"{name}={n}" for name, n in zip(AXES, axes, strict=True))
    return (
        f"it was sampled on other devices (mesh {was}) than there are here ({devices}), "
        "where sums are rounded otherwise"
    )


@dataclasses.dataclass(frozen=True)
class Again:
    """A trajectory that was sampled again.

    Attributes:
      rewards: of its turns.
      remarks: sentences on what is not as it was.
      decode: a token as text.
      noise: (turn, place of a token in its response) -> its random numbers.
      cut: whether improbable tokens are never sampled (`rl.top_k`, `rl.top_p`, `rl.min_p`).
    """

    trajectory: Trajectory
    rewards: Float[np.ndarray, " T"]
    remarks: Sequence[str]
    decode: Callable[[int], str]
    noise: Callable[[int, int], Float[np.ndarray, " V"]]
    cut: bool


def sampled_again(found: Found, origin: Origin, member: int, config: ConfigDict) -> Again:
    """The whole group is sampled, as it was."""
    rl = config.rl
    built = stage.build(config, str(found.workdir))
    charts = built.charts("train")
    chart = _chart(charts, found.row["chart"])
    params = policy_of(origin, found, built)
    key = jax.random.wrap_key_data(jnp.array(origin.key, jnp.uint32))
    with ChartEnv(stage.env_config(config)) as env, built.judge() as judge:
        engine = built.engine(env, rl.temperature, judge)
        groups = engine.begun(
            [chart], [origin.uid], mode=MODES[config.stage], group=rl.group, turns=rl.turns
        )
        engine.run(params, groups, key, turns=rl.turns)
    again = trajectories(groups[0])
    rewards = rewards_of([again], RewardConfig.of(config))[0, member]

    def numbers(turn: int, token: int) -> Float[np.ndarray, " V"]:
        parted = turn >= groups[0].parts_at
        uid = again[member].uid if parted else origin.uid
        return np.asarray(noise(key, turn, uid, token, built.model.config.vocab_size))

    def text(token: int) -> str:
        return built.tokenizer.decode([token])

    remarks = _changed_since(found, config, charts)
    cut = bool(rl.top_k or rl.top_p < 1 or rl.min_p)
    return Again(again[member], rewards, remarks, text, numbers, cut)


def _changed_since(found: Found, config: ConfigDict, charts: ChartDirectory) -> list[str]:
    """What the run began with and is another now, a sentence for each."""
    now = {"data.dir": charts.digest()}
    if config.init_from:
        now["init_from"] = source_digest(config.init_from)
    saved = digests_of(str(found.workdir))
    return [
        f"{field} holds something else than when the run began"
        for field, digest in now.items()
        if saved.get(field, digest) != digest
    ]


def compare(
    found: Found, again: Trajectory, rewards: Float[np.ndarray, " T"]
) -> tuple[list[dict[str, str | int]], bool]:
    """(a row per turn for people, whether all is the same)."""
    sampled = [piece["ids"] for piece in found.row["pieces"] if piece["turn"]]
    table: list[dict[str, str | int]] = []
    same = len(sampled) == len(again.turns)
    for number, (before, ids, turn, reward) in enumerate(
        zip(found.row["turns"], sampled, again.turns, rewards, strict=True), 1
    ):
        row: dict[str, str | int] = {"turn": number}
        tokens, alike = _tokens(np.array(ids, np.int64), turn.ids)
        pixels, equal = _pixels(found.pictures, before["render"], turn)
        paid, agreed = _reward(before["reward"], float(reward))
        row |= {"tokens": tokens, "status": f"{before['status']} / {turn.execution.status}"}
        row |= {"pixels": pixels, "reward": paid}
        if alike and before.get("logps"):
            gap = np.abs(np.array(before["logps"]) - turn.logps).max(initial=0.0)
            row["log-probabilities"] = f"{gap:.4f} apart at most"
        same &= alike and equal and agreed and before["status"] == turn.execution.status
        table.append(row)
    return table, same


def _tokens(before: Int[np.ndarray, " A"], now: Int[np.ndarray, " B"]) -> tuple[str, bool]:
    first = _first_differing(before, now)
    if first is None:
        return f"all {len(now)} alike", True
    return f"differ from number {first} on ({len(before)} / {len(now)})", False


def _first_differing(before: Int[np.ndarray, " A"], now: Int[np.ndarray, " B"]) -> int | None:
    """The first place where two rows of ids differ, or one of them ends; None where none does."""
    if np.array_equal(before, now):
        return None
    least = min(len(before), len(now))
    differing = np.flatnonzero(before[:least] != now[:least])
    return int(differing[0]) if differing.size else least


def why_different(found: Found, again: Again) -> str:
    """Of the first token that differs, what was sampled before and now, and whether rounding
    explains it; "" where all tokens are alike.

    What is sampled is the token whose log-probability and random number (`sampler.noise`) have the
    largest sum:

                      "bar"                   "plot"
        before        -0.70 + 1.20 = 0.50     less
        now           less                    -1.61 + 2.11 = 0.50      a tie, which rounding decides

    Each sum was the largest of its time, so the two differ by no more than log-probabilities have
    moved in between. Where that is more than rounding moved those of the tokens before, the policy
    or what it was shown is another.
    """
    answers = [piece["ids"] for piece in found.row["pieces"] if piece["turn"]]
    for number, (before, turn) in enumerate(zip(answers, again.trajectory.turns, strict=True), 1):
        at = _first_differing(np.array(before, np.int64), turn.ids)
        if at is None:
            continue
        first = f"turn {number}, token {at} is the first that differs"
        if not _was_shown_the_same(found, again.trajectory, number):
            return f"{first}; what the policy was shown before it differs too"
        logps = found.row["turns"][number - 1].get("logps")
        if not logps or at >= min(len(before), len(turn.ids)):
            return f"{first}; one of the two responses ends there"
        numbers = again.noise(number, at)
        old, new = before[at], int(turn.ids[at])
        apart = abs(float(logps[at] + numbers[old] - turn.logps[at] - numbers[new]))
        moved = np.abs(np.array(logps[:at]) - turn.logps[:at]).max(initial=0.0)
        tie = apart <= max(ROUNDING, 2 * moved)
        unless = ", unless rl.top_k, rl.top_p or rl.min_p cut one of them" if again.cut else ""
        return (
            f"{first}: {again.decode(old)!r} (log-probability {logps[at]:.4f}) before, "
            f"{again.decode(new)!r} ({turn.logps[at]:.4f}) now. With their random numbers they are "
            f"{apart:.4f} apart; log-probabilities of the tokens before them, {moved:.4f} at most: "
            + ("a tie, which rounding decides" if tie else f"more than rounding explains{unless}")
        )
    return ""


def _was_shown_the_same(found: Found, again: Trajectory, turn: int) -> bool:
    """Whether the policy was shown the same up to a turn: texts, and pictures of turns before."""
    before = [piece["ids"] for piece in found.row["pieces"] if not piece["turn"]]
    now = [piece.ids.tolist() for piece in again.pieces if not piece.turn]
    earlier = zip(found.row["turns"][: turn - 1], again.turns, strict=False)
    pictures = [_pixels(found.pictures, row["render"], now)[1] for row, now in earlier]
    return before[:turn] == now[:turn] and all(pictures)


def _pixels(pictures: Path, name: str | None, turn: Turn) -> tuple[str, bool]:
    image = turn.execution.image
    if name is None or image is None:
        same = name is None and image is None
        return ("none" if same else f"{_drawn(name)} / {_drawn(image)}"), same
    path = Path(places.bring(pictures / name))
    if not path.is_file():
        return "its picture is gone", False
    before = np.asarray(decode(path.read_bytes()))
    if before.shape != image.shape:
        return f"sizes {before.shape[1::-1]} / {image.shape[1::-1]}", False
    differing = int((before != image).any(axis=-1).sum())
    return (f"{differing} differ" if differing else "all alike"), not differing


def _drawn(picture: Any) -> str:
    return "none" if picture is None else "drawn"


def _reward(before: float | None, now: float) -> tuple[str, bool]:
    if before is None or np.isnan(now):
        return f"{before} / {now:.6f}", before is None and bool(np.isnan(now))
    return f"{before:.6f} / {now:.6f}", abs(before - now) <= REWARD_MARGIN


def _chart(charts: ChartDirectory, name: str) -> Chart:
    for chart in charts:
        if chart.id == name:
            return chart
    raise ConfigError(f"the chart {name!r} is not in {charts.directory}, where the run had it")


def _moved(path: str, workdir: Path) -> str:
    """A path of a configuration, or the same name beside the stage where the run was moved; it may
    name a checkpoint, as in `DIR@120`.
    """
    if not path or os.path.exists(work_directory(path)):
        return path
    beside = str(workdir.parent / os.path.basename(os.path.normpath(path)))
    source = work_directory(beside)
    brought = places.bring(source)
    return brought + beside.removeprefix(source) if os.path.exists(brought) else path


def _listed(numbers: Sequence[int], what: str) -> str:
    return f"{what} {', '.join(map(str, numbers))}" if numbers else f"no {what.split(' of ')[0]}"


def main() -> None:
    """Samples one trajectory again and prints the table."""
    parser = Parser(prog="python -m mmrecoder_jax.replay", description=__doc__.split("\n\n")[1])
    parser.add_argument("--workdir", required=True, help="of a pipeline, or of a stage")
    parser.add_argument("--id", required=True, help="such as stage2/trajectories/21/3")
    given = parser.parse_args()
    with ending_in_one_line(given.traceback):
        check_place("--workdir", given.workdir)
        found = find(places.view(given.workdir, "replay"), given.id)
        config = saved_config(found.workdir)
        config.data.dir = places.bring(data_dir(config, str(found.workdir)))
        cli.fetch(config)
        origin, member = origin_of(found, config)
        cli.start_devices(config, None)
        remarks = [use_mesh(config, origin, jax.device_count())]
        again = sampled_again(found, origin, member, config)
        table, same = compare(found, again.trajectory, again.rewards)
        remarks = [*remarks, *again.remarks, why_different(found, again)]
    print(format_table(table))
    for remark in filter(None, remarks):
        print(remark)
    print("the same came out" if same else "something else came out")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
