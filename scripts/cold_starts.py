"""How much the cold starts depend on luck, and what each part of cold start 2 is worth.

    python scripts/cold_starts.py --workdir=runs/cold_starts --minutes=110

Cold start 1 and cold start 2 run over seeds and over two kinds of rounding: as the CPU does it, and
without fused multiply-adds (SSE 4.2, x86 alone). Then cold start 2 is repeated from the first cold
start 1 in half of its steps, as it is and with one thing changed at a time (`VARIANTS`): with fewer
drafts of the policy itself or none, without right drafts or with more of them, and with other
pictures as feedback. Every policy is evaluated on the same test charts, greedily and sampled.
Written below the work directory:

    data/                           the charts, which all share
    <rounding>/seed-<n>/<policy>/   a cold start; its evaluation is in <policy>-evaluation/
    cold_starts.jsonl               scores of every chart of every policy
    cold_starts.md, cold_starts.png the tables and a picture, made from it alone (--table)

Flags `--config.FIELD=VALUE` go to every command whose configuration has that field. Everything
resumes: kill it, or give --minutes, and the same command goes on.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from experiment import (
    Flags,
    Piece,
    carry_out,
    check_fields_known,
    draw_turns,
    evaluated,
    flags_of,
    is_evaluated,
    numbers,
    write_rows,
    write_tables,
)

from mmrecoder_jax.command import ending_in_one_line
from mmrecoder_jax.config import STAGES, ConfigError, load
from mmrecoder_jax.pipeline import has_finished

FIRST, SECOND = STAGES[:2]
HOST = "host"
ROUNDINGS = {HOST: "", "sse": "--xla_cpu_max_isa=SSE4_2"}  # for XLA_FLAGS
RESULTS, TABLES, PICTURE = "cold_starts.jsonl", "cold_starts.md", "cold_starts.png"
HALF = "half as long"
# Cold start 2, by name: what it changes. All but the first take half of the steps. ALL stands for
# the number of drafts as it is, THIRD and REST for parts of it.
VARIANTS = {
    "as_it_is": ("as it is", ()),
    "half": (HALF, ()),
    "no_policy": (
        f"{HALF}, no drafts of the policy",
        ("--config.dialogues.policy=0", "--config.dialogues.synthetic=ALL"),
    ),
    "fewer_policy": (
        f"{HALF}, a third of drafts of the policy",
        ("--config.dialogues.policy=THIRD", "--config.dialogues.synthetic=REST"),
    ),
    "no_right": (f"{HALF}, no right drafts", ("--config.dialogues.right=0.0",)),
    "more_right": (f"{HALF}, 0.4 of right drafts", ("--config.dialogues.right=0.4",)),
    "render": (f"{HALF}, plain render", ("--config.feedback.image=render",)),
    "difference": (f"{HALF}, unsigned difference", ("--config.feedback.image=difference",)),
}
AS_IT_IS, *VARIED = VARIANTS


@dataclasses.dataclass(frozen=True)
class Policy:
    """One cold start.

    Attributes:
      name: of its directory: `FIRST`, or one of `VARIANTS`.
    """

    rounding: str
    seed: int
    name: str

    @property
    def title(self) -> str:
        """What it is called in the tables."""
        said = "" if self.rounding == HOST else f", {self.rounding}"
        kind = "cold start 1" if self.name == FIRST else f"cold start 2 {VARIANTS[self.name][0]}"
        return kind + said


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the flags ask for.

    Attributes:
      steps, drafts: of cold start 2, as it is.
    """

    workdir: Path
    seeds: tuple[int, ...]
    charts: int
    steps: int
    drafts: int
    flags: Flags

    @property
    def policies(self) -> Iterator[Policy]:
        """All cold starts, in the order in which they run."""
        for seed in self.seeds:
            for rounding in ROUNDINGS:
                yield Policy(rounding, seed, FIRST)
                yield Policy(rounding, seed, AS_IT_IS)
        for name in VARIED:
            yield Policy(HOST, self.seeds[0], name)

    def directory(self, policy: Policy) -> Path:
        """The work directory of a cold start."""
        return self.workdir / policy.rounding / f"seed-{policy.seed}" / policy.name

    def evaluation(self, policy: Policy) -> Path:
        """Where its evaluation is."""
        directory = self.directory(policy)
        return directory.with_name(f"{directory.name}-evaluation")


def pieces(plan: Plan) -> Iterator[Piece]:
    """All that is to run, in order: each knows by what is on disk whether it is done."""
    for policy in plan.policies:
        directory, evaluation = plan.directory(policy), plan.evaluation(policy)
        rounding = ROUNDINGS[policy.rounding]
        flags = f"{os.environ.get('XLA_FLAGS', '')} {rounding}".strip()
        variables = {"XLA_FLAGS": flags} if rounding else {}
        stage = FIRST if policy.name == FIRST else SECOND
        command = plan.flags.module("train", stage, directory, *_fields(plan, policy))
        title = f"{policy.title}, seed {policy.seed}"
        yield Piece(title, command, has_finished(stage, str(directory)), variables)
        # The image of the feedback is the policy's: it is asked as it was taught.
        shown = [flag for flag in _changes(plan, policy) if "feedback.image" in flag]
        turns = 1 if stage == FIRST else 2
        command = plan.flags.evaluation(
            directory, evaluation, policy.seed, plan.charts, turns, *shown
        )
        yield Piece(f"{title}: evaluation", command, is_evaluated(evaluation), variables)


def _fields(plan: Plan, policy: Policy) -> list[str]:
    """Flags of a cold start's own."""
    seed = f"--config.seed={policy.seed}"
    if policy.name == FIRST:
        return [seed]
    source = plan.directory(dataclasses.replace(policy, name=FIRST))
    steps = plan.steps if policy.name == AS_IT_IS else plan.steps // 2
    found = [seed, f"--config.init_from={source}", f"--config.train.steps={steps}"]
    if policy.name == "half":  # the same dialogues as the longer one, which need not be made twice
        longer = plan.directory(dataclasses.replace(policy, name=AS_IT_IS))
        found.append(f"--config.data.dialogues={longer / 'dialogues'}")
    return [*found, *_changes(plan, policy)]


def _changes(plan: Plan, policy: Policy) -> list[str]:
    flags = VARIANTS[policy.name][1] if policy.name in VARIANTS else ()
    third = plan.drafts // 3
    counts = {"ALL": plan.drafts, "THIRD": third, "REST": plan.drafts - third}
    parts = [flag.partition("=") for flag in flags]
    return [f"{field}={counts.get(value, value)}" for field, _, value in parts]


def collect(plan: Plan) -> None:
    """Writes `cold_starts.jsonl` from the evaluations that are there."""
    rows = []
    for policy in plan.policies:
        rows += evaluated(policy.title, policy.seed, plan.evaluation(policy))
    write_rows(plan.workdir / RESULTS, rows)


def tables(workdir: Path) -> str:
    """Writes `cold_starts.md` and the picture from `cold_starts.jsonl`; returns the tables.

    Raises:
      ConfigError: there are no results.
    """
    base = f"cold start 2 {HALF}"
    text = write_tables(workdir / RESULTS, workdir / TABLES, base)
    draw_turns(workdir / RESULTS, workdir / PICTURE)
    return text


def main() -> None:
    parser = flags_of(__doc__)
    parser.add_argument("--seeds", default="0,1,2", help="of weights, data and evaluation")
    parser.add_argument("--charts", type=int, default=256, help="test charts of an evaluation")
    args, flags = parser.parse_known_args()
    with ending_in_one_line(args.traceback):
        check_fields_known(flags, (FIRST, SECOND, "evaluate"), args.size)
        if args.charts < 2:
            raise ConfigError(f"--charts={args.charts}: use 2 or more")
        second = load(SECOND, args.size)
        plan = Plan(
            workdir=args.workdir,
            seeds=numbers("seeds", args.seeds),
            charts=args.charts,
            steps=second.train.steps,
            drafts=second.dialogues.policy + second.dialogues.synthetic,
            flags=Flags(args.size, args.workdir / "data", tuple(flags)),
        )
        carry_out(
            args,
            pieces(plan),
            lambda: collect(plan),
            lambda: tables(plan.workdir),
            plan.workdir / RESULTS,
        )


if __name__ == "__main__":
    main()
