"""Stands in for a training command: writes metrics and the notes of checkpoints, learns nothing.

The environment variable STUB says in JSON what it does: "steps"; "pause", seconds of a step;
"fail", by name of the work directory the step at which its first try fails, with "status"; "child":
also starts a process that outlives it; "listens": SIGTERM ends it behind its step, with 75.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mmrecoder_jax import places


def main() -> None:
    given = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
    plan = {"steps": 3, "pause": 0.0, "fail": {}, "child": False, "status": 1, "listens": False}
    plan |= json.loads(os.environ.get("STUB", "{}"))
    workdir = Path(places.local(given["workdir"], 0))
    workdir.mkdir(parents=True, exist_ok=True)
    with places.pushed(str(workdir)):
        train(given, plan, workdir)


def train(given: dict[str, str], plan: dict, workdir: Path) -> None:
    (workdir / "config.json").write_text("{}")
    with open(workdir / "starts.jsonl", "a") as f:
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        f.write(json.dumps(given | {"cards": cards, "began": time.monotonic()}) + "\n")
    if data := given.get("config.data.dir"):
        for split in ("train", "val", "test"):
            (Path(data) / split).mkdir(parents=True, exist_ok=True)
    if plan["child"]:
        sleeper = [sys.executable, "-c", f"import time; time.sleep(600)  # {workdir}"]
        subprocess.Popen(sleeper)
    told = []
    if plan["listens"]:
        signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    saved = places.steps(str(workdir))
    for step in range(max(saved, default=0) + 1, plan["steps"] + 1):
        broke = workdir / "broke"
        if plan["fail"].get(workdir.name) == step and not broke.exists():
            broke.touch()
            print("warming up")
            print("error: the stub broke: mend it\nTraceback of others", file=sys.stderr)
            sys.exit(plan["status"])
        score = float(given.get("config.reward.eta", 0)) + int(given.get("config.seed", 0)) / 100
        row = {"stage": "stage2", "step": step, "time": 0.0, "turn2/low_level": score + step / 10}
        with open(workdir / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        checkpoint = places.checkpoints(str(workdir)) / str(step)
        (checkpoint / "meta").mkdir(parents=True)
        note = {"stage": "stage2", "step": step, "steps": plan["steps"]}
        (checkpoint / "meta" / "metadata").write_text(json.dumps(note))
        (checkpoint / places.COMMIT).write_text("")
        time.sleep(plan["pause"])
        if told:
            sys.exit(75)
    (workdir / "ended").touch()


if __name__ == "__main__":
    main()
