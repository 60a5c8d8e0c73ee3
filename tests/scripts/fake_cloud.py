"""A cloud for tests of scripts/tpu_vm.sh: a `gcloud` that records its calls, fails as the real one
does, and has workers, which are folders of this machine in which commands really run.

    cloud = FakeCloud(tmp_path, workers=2)
    cloud.states = ["WAITING_FOR_RESOURCES", "ACTIVE"]     one for each look, the last one stays
    cloud.fail("create", "ERROR: ... Quota ...")           the next such call; times=3 for more
    cloud.train = "echo step 1; exit 0"                    what the training command does

The checkout that is copied is a small one, `cloud.checkout`.

What the workers would install is stood in for too: `uv`, `hostname`.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MISSING = (
    "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource "
    "'projects/p/locations/us-west4-a/queuedResources/t' was not found"
)
UV = """#!/bin/bash
echo "uv $*" >> "$CLOUD/installed"
if [[ "$1" == venv ]]; then
    mkdir -p .venv/bin
    cp "$CLOUD/bin/train" .venv/bin/python
fi
"""
TRAIN = """#!/bin/bash
printf '%s\\n' "$*" >> "$CLOUD/trained"
source "$CLOUD/train.sh"
"""


class FakeCloud:
    """The cloud, below a folder; `run` runs scripts/tpu_vm.sh in it."""

    def __init__(self, folder: Path, workers: int = 2):
        self.folder = folder / "cloud"
        self.workers = workers
        self.states: list[str] = ["ACTIVE"]
        self.train = "exit 0"
        self._failures: list[dict[str, object]] = []
        self.checkout = self.folder / "checkout"
        for name in ("scripts", "data", ".venv", "mmrecoder_jax/__pycache__"):
            (self.checkout / name).mkdir(parents=True)
            (self.checkout / name / "file").touch()
        for name in ("tpu_vm.sh", "tpu_worker.sh"):
            shutil.copy(ROOT / "scripts" / name, self.checkout / "scripts")
        bin_ = self.folder / "bin"
        bin_.mkdir(parents=True)
        gcloud = f'#!/bin/bash\nexec {sys.executable} -S {__file__} "$@"\n'
        programs = {
            "gcloud": gcloud,
            "uv": UV,
            "train": TRAIN,
            "hostname": '#!/bin/bash\nbasename "$HOME"\n',
        }
        for name, text in programs.items():
            (bin_ / name).write_text(text)
            (bin_ / name).chmod(0o755)

    def fail(self, words: str, message: str, times: int = 1, after: int = 0) -> None:
        """Lets the next calls with these words fail, as the real gcloud says it.

        Args:
          after: such calls that go well before.
        """
        failure = {"words": words, "message": message, "times": times, "after": after}
        self._failures.append(failure)

    def run(self, *words: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """scripts/tpu_vm.sh WORDS; what it printed is text."""
        plan = {"states": self.states, "failures": self._failures, "workers": self.workers}
        (self.folder / "plan.json").write_text(json.dumps(plan))
        (self.folder / "train.sh").write_text(self.train)
        return subprocess.run(
            ["bash", str(self.checkout / "scripts" / "tpu_vm.sh"), *words],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return os.environ | {"PATH": path, "CLOUD": str(self.folder), "STOP_SECONDS": "5"}

    def home(self, worker: int = 0) -> Path:
        return self.folder / f"worker{worker}"

    def calls(self, word: str = "") -> list[list[str]]:
        """The words of each call of gcloud, of those that have this one."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [words for words in map(json.loads, lines) if not word or word in words]

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def end(self) -> None:
        """Kills what runs on workers."""
        for pid in self.folder.glob("worker*/mmrecoder_run/pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


def gcloud(words: list[str]) -> int:
    """What the program does; returns its status."""
    folder = Path(os.environ["CLOUD"])
    plan = json.loads((folder / "plan.json").read_text())
    with open(folder / "calls.jsonl", "a") as f:
        f.write(json.dumps(words) + "\n")
    said = " ".join(words)
    for failure in plan["failures"]:
        if failure["times"] and failure["words"] in said:
            waits = failure["after"] > 0
            failure["after" if waits else "times"] -= 1
            (folder / "plan.json").write_text(json.dumps(plan))
            if not waits:
                print(failure["message"], file=sys.stderr)
                return 1
    assert words[:2] == ["compute", "tpus"], words
    kind, verb = words[2:4]
    if (kind, verb) == ("queued-resources", "describe"):
        return describe(folder, plan, said)
    if (kind, verb) == ("tpu-vm", "describe"):
        print("READY")
    elif (kind, verb) == ("queued-resources", "delete"):
        take_away(folder)
    elif verb == "scp":
        for home in homes(folder, plan["workers"], words):
            shutil.copy(words[4], home / words[5].split(":")[1])
    elif verb == "ssh":
        return ssh(folder, plan["workers"], words)
    else:
        assert (kind, verb) == ("queued-resources", "create"), words
        take_away(folder)
    return 0


def describe(folder: Path, plan: dict, said: str) -> int:
    if "failedData" in said:
        print("There is no more capacity in the zone")
        return 0
    state = plan["states"][0]
    if len(plan["states"]) > 1:
        plan["states"].pop(0)
        (folder / "plan.json").write_text(json.dumps(plan))
    if state == "MISSING":
        print(MISSING, file=sys.stderr)
        return 1
    print(state)
    return 0


def take_away(folder: Path) -> None:
    for home in folder.glob("worker*"):
        pid = home / "mmrecoder_run" / "pid"
        if pid.exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)
        shutil.rmtree(home)


def homes(folder: Path, workers: int, words: list[str]) -> list[Path]:
    (which,) = [word.split("=")[1] for word in words if word.startswith("--worker=")]
    numbers = range(workers) if which == "all" else [int(which)]
    found = [folder / f"worker{number}" for number in numbers]
    for home in found:
        home.mkdir(exist_ok=True)
    return found


def ssh(folder: Path, workers: int, words: list[str]) -> int:
    (command,) = [word.split("=", 1)[1] for word in words if word.startswith("--command=")]
    status = 0
    for number, home in enumerate(homes(folder, workers, words)):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=home,
            env=os.environ | {"HOME": str(home)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        print(done.stdout, end="", flush=True)
        print(done.stderr, end="", file=sys.stderr, flush=True)
        if done.returncode:
            status = done.returncode
            said = f"##### Command execution on worker {number} failed with exit status {status}"
            print(said, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(gcloud(sys.argv[1:]))
