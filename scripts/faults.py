"""Breaks a small RL run in many ways, goes on with it, and compares it with one left alone.

    python scripts/faults.py                                      everything: about an hour
    python scripts/faults.py --only sigkill disk-full             these faults
    python scripts/faults.py --only                               nothing: writes the page again

Data, first weights, compiled programs and the uninterrupted runs are made once below `--where`. A
row for each broken run goes to `--jsonl` as soon as it is there; a row that is there is not made
again, so the same command goes on after a kill. `--page` is written from the rows.

A broken run is finished by the same command and compared with the uninterrupted run: every
parameter and every number of the optimizer byte for byte, the rows of metrics but for times and for
counts since the process started, trajectories byte for byte, names of files. What a fault leaves
behind is looked for in the run's own TMPDIR, its work directory, and among processes.

Where a process was when it was killed: a signal handler (`sitecustomize.py`, written below
`--where`) writes the stack of its main thread a moment earlier. A full disk is a tmpfs of a few MB,
which needs root; as another user these rows say that they were skipped.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from absl import logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults_lab import PHASES, ROOT, BucketRun, Lab, Row, Run, say, until

from mmrecoder_jax.learner.checkpoint import latest_step
from tests.buckets import serving

# ---------------------------------------------------------------- faults of one process


def sigkill(lab: Lab, row: Row) -> Row:
    """SIGKILL at random moments, four times in a run."""
    run = Run(lab, f"{row.fault}-{row.number}")
    for step, part in lab.moments(row.fault, 5, 4, row.number):
        _killed_at(run, row, step, part)
    return run.finish(row)


def _killed_at(run: Run, row: Row, step: int, part: str) -> None:
    """Starts the run, or has it go on, and kills it in a part of a step."""
    run.processes.clear()
    run.start()
    run.reach(step, part)
    row.moments.append(run.moment())
    row.seconds = max(row.seconds, run.stop())
    row.left += run.still_there()


def aimed(lab: Lab, row: Row) -> Row:
    """SIGKILL in a short phase, twice in a run: while a checkpoint is being written, or while
    scripts are waited for.
    """
    run, draw = Run(lab, f"{row.fault}-{row.number}"), lab.random(row.fault, row.number)
    for step in (2, 5):
        run.processes.clear()
        run.start()
        run.reach(step, 0.0)
        if row.number:
            until(lambda: run.phase() == "execution", pause=0.01)
        else:
            until(run.saving, pause=0.001)
            time.sleep(draw.uniform(0, 0.1))
        row.moments.append(run.moment())
        run.stop()
        row.left += run.still_there()
    return run.finish(row)


def signalled(lab: Lab, row: Row, how: signal.Signals) -> Row:
    """Ends a run politely at a random moment."""
    run = Run(lab, f"{row.fault}-{row.number}")
    run.start()
    run.reach(*lab.moments(row.fault, 1, 1, row.number)[0])
    row.moments.append(run.moment())
    row.seconds = run.stop(how)
    row.ends += run.endings()
    return run.finish(row)


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """A tmpfs at a path."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def needs_root(fault: Callable[[Lab, Row], Row]) -> Callable[[Lab, Row], Row]:
    """A fault that mounts file systems."""

    def one(lab: Lab, row: Row) -> Row:
        if os.geteuid():
            row.skipped = "mounting a small file system needs root"
            return row
        return fault(lab, row)

    return one


def disk_full(lab: Lab, row: Row) -> Row:
    """The disk of the work directory fills up at a random moment."""
    run = Run(lab, f"{row.fault}-{row.number}")
    with mounted(run.work, "size=64m"):
        run.start()
        run.reach(*lab.moments(row.fault, 3, 1, row.number)[0])
        row.moments.append(run.moment())
        begun = time.monotonic()
        ballast = run.work / "ballast"
        fill(ballast)
        run.wait(120)
        row.seconds = time.monotonic() - begun
        row.ends += run.endings()
        ballast.unlink()
        return run.finish(row)


def disk_small(lab: Lab, row: Row) -> Row:
    """The disk has room for two checkpoints and not for a third; it is made larger afterwards."""
    run, size = Run(lab, f"{row.fault}-{row.number}"), 26
    with mounted(run.work, f"size={size}m"):
        row.moments.append(f"{size} MB")
        run.start()
        run.wait(300)
        row.ends += run.endings()
        subprocess.run(["mount", "-o", "remount,size=64m", str(run.work)], check=True)
        return run.finish(row)


def fill(path: Path) -> None:
    """Takes all that is free on a file system."""
    with path.open("wb", buffering=0) as f, contextlib.suppress(OSError):
        while f.write(bytes(1 << 16)):
            pass


def read_only(lab: Lab, row: Row) -> Row:
    """A work directory on a read-only file system, at the start or with a half of the run in it."""
    run = Run(lab, f"{row.fault}-{row.number}")
    with mounted(run.work, "size=64m"):
        half = bool(row.number)
        if half:
            shutil.copytree(lab.half(), run.work, dirs_exist_ok=True)
        row.moments.append("in the middle of a run" if half else "at the start")
        subprocess.run(["mount", "-o", "remount,ro", str(run.work)], check=True)
        run.start()
        run.wait(240)
        row.ends += run.endings()
        subprocess.run(["mount", "-o", "remount,rw", str(run.work)], check=True)
        return run.finish(row) if half else row


def no_rights(lab: Lab, row: Row) -> Row:
    """A work directory that the user may not write; root gives up its rights for this."""
    run = Run(lab, f"{row.fault}-{row.number}")
    half = bool(row.number)
    if half:
        shutil.copytree(lab.half(), run.work)
    run.work.mkdir(exist_ok=True)
    row.moments.append("in the middle of a run" if half else "at the start")
    rights(run.work, 0o555, 0o444)
    none = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    run.start(before=() if os.geteuid() else none)
    run.wait(240)
    row.ends += run.endings()
    rights(run.work, 0o755, 0o644)
    return run.finish(row) if half else row


def rights(top: Path, folders: int, others: int) -> None:
    """Sets the rights of a directory and of all below it."""
    for path in [top, *top.rglob("*")]:
        path.chmod(folders if path.is_dir() else others)


# ---------------------------------------------------------------- damaged checkpoints


def biggest(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, part: float) -> None:
    """Turns the bits of one byte around."""
    data = bytearray(path.read_bytes())
    data[int(part * (len(data) - 1))] ^= 0xFF
    path.write_bytes(data)


def flip_many(step: Path) -> None:
    """One byte of each of ten files, drawn with the seed 0."""
    draw = random.Random(0)
    chosen = draw.sample(
        sorted(p for p in step.rglob("*") if p.stat().st_size > 1 and p.is_file()), 10
    )
    for path in chosen:
        flip(path, draw.random())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "parameters cut": lambda step: cut(biggest(step / "params")),
    "parameters removed": lambda step: biggest(step / "params").unlink(),
    "optimizer removed": lambda step: shutil.rmtree(step / "learner"),
    "a byte of parameters": lambda step: flip(biggest(step / "params"), 0.1),
    "a byte of the optimizer": lambda step: flip(biggest(step / "learner"), 0.5),
    "a byte in each of ten files": flip_many,
    "the table of arrays is no JSON": lambda step: cut(step / "params" / "_METADATA"),
    "the position in the data is no JSON": lambda step: cut(
        next((step / "data").glob("process_*"))
    ),
    "directory emptied": lambda step: [shutil.rmtree(p) for p in step.iterdir() if p.is_dir()],
}


def damaged(lab: Lab, row: Row) -> Row:
    """The newest checkpoint is damaged while nothing runs."""
    run, name = Run(lab, f"{row.fault}-{row.number}"), list(DAMAGES)[row.number]
    shutil.copytree(lab.half(), run.work)
    newest = latest_step(str(run.work))
    DAMAGES[name](run.work / "checkpoints" / str(newest))
    row.moments.append(name)
    row = run.finish(row)
    aside = f"file checkpoints/damaged-{newest}"
    if aside in row.left and "cannot be read" in run.file("out").read_text():
        row.left.remove(aside)
        row.ends.append("set aside, said")
    elif not row.differences:
        row.ends.append("not needed")
    errors = run.file("err").read_text(errors="replace").strip().splitlines()
    row.left += [f"output of a library: {line[:200]}" for line in errors[:1]]
    return row


# ---------------------------------------------------------------- faults of a run in a bucket


def in_bucket(lab: Lab, row: Row) -> Row:
    """SIGKILL at random moments, three times in a run in a bucket; each time another machine, which
    has nothing of the run, goes on.
    """
    if importlib.util.find_spec("gcsfs") is None:
        row.skipped = "what reads buckets is not installed: pip install 'mmrecoder_jax[gcs]'"
        return row
    with serving("bucket") as cloud:
        run = BucketRun(lab, f"{row.fault}-{row.number}", cloud)
        for step, part in lab.moments(row.fault, 2, 3, row.number):
            _killed_at(run, row, step, part)
            run.leave()
        return run.finish(row)


# ---------------------------------------------------------------- faults of two processes


def two(lab: Lab, row: Row) -> tuple[Run, int]:
    """Two processes at a random moment, and the one that the fault is for."""
    run = Run(lab, f"{row.fault}-{row.number}")
    run.start(2)
    run.reach(*lab.moments(row.fault, 2, 1, row.number)[0])
    row.moments.append(f"process {row.number}, {run.moment()}")
    return run, row.number


def host_dies(lab: Lab, row: Row) -> Row:
    """One of two processes is killed."""
    run, host = two(lab, row)
    begun = time.monotonic()
    run.processes[host].kill()
    run.wait(300)
    row.seconds = time.monotonic() - begun
    row.ends += run.endings()
    return run.finish(row, 2)


def host_hangs(lab: Lab, row: Row) -> Row:
    """One of two processes is stopped; when the other has ended, it may go on."""
    run, host = two(lab, row)
    begun = time.monotonic()
    run.processes[host].send_signal(signal.SIGSTOP)
    until(lambda: run.processes[1 - host].poll() is not None, 300, 0.1)
    row.seconds = time.monotonic() - begun
    run.processes[host].send_signal(signal.SIGCONT)
    run.wait(300)
    row.ends += run.endings()
    return run.finish(row, 2)


def host_late(lab: Lab, row: Row) -> Row:
    """One of two processes starts 20 s after the other."""
    run = Run(lab, f"{row.fault}-{row.number}")
    row.moments.append("process 1 comes 20 s after process 0")
    return run.finish(row, 2, late=20.0)


def host_never(lab: Lab, row: Row) -> Row:
    """One of two processes never starts."""
    run = Run(lab, f"{row.fault}-{row.number}")
    begun = time.monotonic()
    run.start(2, only=0)
    row.moments.append("process 0 alone")
    run.wait(500)
    row.seconds = time.monotonic() - begun
    row.ends += run.endings()
    row.left += run.still_there()
    return row


def hosts_terminated(lab: Lab, row: Row) -> Row:
    """SIGTERM to both processes, as a cluster does that takes its machines back."""
    run, _ = two(lab, row)
    row.seconds = run.stop(signal.SIGTERM, 120)
    row.ends += run.endings()
    return run.finish(row, 2)


# ---------------------------------------------------------------- the page


@dataclasses.dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
      words: for the page.
      rows: broken runs.
      inflict: breaks one run and finishes it.
    """

    words: str
    rows: int
    inflict: Callable[[Lab, Row], Row]


FAULTS = {
    "sigkill": Fault("SIGKILL at a random moment", 5, sigkill),
    "sigkill-aimed": Fault("SIGKILL aimed at a save, at an execution", 2, aimed),
    "sigterm": Fault("SIGTERM", 1, functools.partial(signalled, how=signal.SIGTERM)),
    "sigint": Fault("Ctrl-C", 1, functools.partial(signalled, how=signal.SIGINT)),
    "disk-full": Fault("the disk fills up at a random moment", 3, needs_root(disk_full)),
    "disk-small": Fault("the disk is too small", 1, needs_root(disk_small)),
    "read-only": Fault("read-only file system", 2, needs_root(read_only)),
    "no-rights": Fault("work directory without rights", 2, no_rights),
    "damaged": Fault("damaged newest checkpoint", len(DAMAGES), damaged),
    "bucket": Fault("SIGKILL of a run in a bucket, then another machine", 2, in_bucket),
    "host-dies": Fault("one of two processes is killed", 2, host_dies),
    "host-hangs": Fault("one of two processes hangs", 2, host_hangs),
    "host-late": Fault("one of two processes starts 20 s late", 1, host_late),
    "host-never": Fault("one of two processes never starts", 1, host_never),
    "hosts-terminated": Fault("SIGTERM to both processes", 1, hosts_terminated),
}


def read(path: Path) -> list[Row]:
    """The rows that are there, in the order of FAULTS."""
    if not path.exists():
        return []
    rows = [Row(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    return sorted(rows, key=lambda row: (list(FAULTS).index(row.fault), row.number))


def page(rows: Sequence[Row]) -> str:
    """The page, from rows alone."""
    text = [(Path(__file__).parent / "faults_head.md").read_text("utf-8").rstrip(), ""]
    lines: list[Sequence[object]] = [("fault", "times", "what happened", "ended after", "equal")]
    lines += [
        summary(fault.words, [row for row in rows if row.fault == name])
        for name, fault in FAULTS.items()
        if any(row.fault == name for row in rows)
    ]
    text += [markdown(lines), "", "## Every run", ""]
    lines = [("fault", "where", "how it ended", "s", "different", "left behind")]
    lines += [
        (
            f"{row.fault} {row.number}",
            "; ".join(row.moments),
            row.skipped or "; ".join(dict.fromkeys(row.ends)),
            f"{row.seconds:.1f}" if row.seconds else "",
            "; ".join(row.differences) or "nothing",
            "; ".join(row.left) or "nothing",
        )
        for row in rows
    ]
    return "\n".join([*text, markdown(lines)]) + "\n"


def summary(words: str, rows: Sequence[Row]) -> tuple[object, ...]:
    """A line of the first table."""
    tried = [row for row in rows if not row.skipped]
    if not tried:
        return words, 0, rows[0].skipped, "", ""
    finished = [row for row in tried if row.bytes or row.differences]
    equal = sum(not row.differences for row in finished)
    seconds = max(row.seconds for row in tried)
    return (
        words,
        sum(len(row.moments) for row in tried),
        happened(tried),
        f"{seconds:.1f} s at most" if seconds else "",
        f"{equal} of {len(finished)} runs, {max(row.bytes for row in finished):,} bytes each"
        if finished
        else "nothing had begun",
    )


def happened(rows: Sequence[Row]) -> str:
    """Phases that were hit, ways that processes ended, what was left behind; each counted."""
    moments = [moment for row in rows for moment in row.moments]
    kinds = (*PHASES, "other", "start")
    phases = [phase for moment in moments for phase in kinds if f": {phase}" in moment]
    found = [f"{count} in {phase}" for phase, count in collections.Counter(phases).items()]
    under_way = sum("under way" in moment and ": save" not in moment for moment in moments)
    found += [f"{under_way} of these with a save under way"] * bool(under_way)
    ends = collections.Counter(short(end) for row in rows for end in row.ends)
    found += [f"{end}: {count}" for end, count in ends.items()]
    left = sum(bool(row.left) for row in rows)
    return "; ".join(found) + f"; left behind: {f'by {left}' if left else 'nothing'}"


def short(end: str) -> str:
    """The kind of an ending.

    >>> short("status 1: error: /runs/a: No space left on device")
    'status 1 with one line'
    """
    status, said, _ = end.partition(": ")
    if not status.startswith("status") or not said:
        return end
    return f"{status} with {'more than one line' if end.endswith('of errors)') else 'one line'}"


def markdown(lines: Sequence[Sequence[object]]) -> str:
    """A table; the first line is its head."""
    rows = [[str(cell).replace("|", "/") for cell in cells] for cells in lines]
    head, *body = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = Path(tempfile.gettempdir()) / "mmrecoder-faults"
    parser.add_argument("--only", nargs="*", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--where", type=Path, default=where, help="keeps what the runs share")
    parser.add_argument("--jsonl", type=Path, default=ROOT / "docs" / "faults.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "faults.md")
    parser.add_argument("--seed", type=int, default=0, help="of all random moments")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)  # orbax says what it looked for in vain
    lab = Lab(flags.where, flags.jsonl, flags.seed)
    failed = False
    for name in flags.only:
        for number in range(FAULTS[name].rows):
            if any((row.fault, row.number) == (name, number) for row in read(flags.jsonl)):
                continue
            lab.whole()
            try:
                row = FAULTS[name].inflict(lab, Row(name, number))
            except RuntimeError as error:  # the run ended before it was broken: try again
                say(f"{name} {number}: {error}")
                failed = True
                continue
            with flags.jsonl.open("a", encoding="utf-8") as f:
                # Messages name files of the run: the page says where from below it.
                line = json.dumps(dataclasses.asdict(row)).replace(f"{lab.where}/runs/", "")
                f.write(line + "\n")
            say(f"{name} {number}: {'; '.join(row.moments)} -> {'; '.join(row.ends)}")
            if not row.differences and not row.left:  # else its directory is there to look into
                shutil.rmtree(lab.where / "runs" / f"{name}-{number}", ignore_errors=True)
            say(f"    differences: {row.differences}, left: {row.left}, {row.seconds:.1f} s")
    flags.page.write_text(page(read(flags.jsonl)), encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main())
