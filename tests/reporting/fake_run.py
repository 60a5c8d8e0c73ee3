"""A work directory of a pipeline that was never run, of any size, as a run would leave it."""

import hashlib
import json
from pathlib import Path

import numpy as np

from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.evaluation import bootstrap

CODE = """import matplotlib.pyplot as plt
fig, ax = plt.subplots()
x = ['A', 'B', 'C', 'D']
ax.bar(x, [{heights}], color='{color}')
ax.set_title('{title}')
plt.show()"""
COLORS = {"tomato": (255, 99, 71), "teal": (0, 128, 128), "gold": (255, 215, 0)}
TITLES = ("Budget", "Rain", "Sales")
HOSTILE = "</script><img src=x onerror=alert(1)> \u202egpj.exe"
SIZE = (112, 168)  # of a picture


def response(thought: str, code: str) -> str:
    return f"<think>{thought}</think>\n```python\n{code}\n```"


def drawing(heights: list[int], color: str) -> bytes:
    """A PNG with four bars."""
    image = np.full((*SIZE, 3), 255, np.uint8)
    for place, height in enumerate(heights):
        left = 18 + 36 * place
        image[SIZE[0] - 10 - 9 * height : SIZE[0] - 10, left : left + 26] = COLORS[color]
    return png_bytes(image)


class Maker:
    """Writes trajectories of a directory, a file per step."""

    def __init__(self, directory: Path, seed: int, judge: bool):
        self.directory, self.judge = directory, judge
        self.rng = np.random.default_rng(seed)

    def write(self, step: int, groups: int, size: int, turns: int = 2) -> list[dict]:
        """A step's rows; every eleventh second turn fails, some repeat, one is hostile."""
        folder = f"{step:06d}"
        (self.directory / "renders" / folder).mkdir(parents=True, exist_ok=True)
        rows = []
        for group in range(groups):
            color, title = list(COLORS)[group % 3], TITLES[group % 3]
            target = self._picture(folder, self._heights(), color)
            for member in range(size):
                number = group * size + member
                row = {
                    "chart": f"train-{step:04d}{group:03d}",
                    "target": target,
                    "uid": number,
                    "advantage": float(self.rng.normal()),
                    "origin": {"uid": group, "policies": [step - 1] * 2, "key": [0, step]},
                    "pieces": [{"turn": 0, "ids": list(range(40))}],
                    "turns": [],
                }
                heights = self._heights()
                for turn in range(turns):
                    row["pieces"].append({"turn": turn + 1, "ids": list(range(100, 140))})
                    repeats = turn and number % 7 == 3
                    heights = heights if repeats else self._heights()
                    failed = number % 11 == (5 if turn else 4)
                    row["turns"].append(self._turn(folder, heights, color, title, failed, number))
                rows.append(row)
        path = self.directory / f"{step:06d}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def _heights(self) -> list[int]:
        return [int(x) for x in self.rng.integers(1, 10, 4)]

    def _picture(self, folder: str, heights: list[int], color: str) -> str:
        data = drawing(heights, color)
        name = f"{folder}/{hashlib.sha256(data).hexdigest()[:16]}.png"
        (self.directory / "renders" / name).write_bytes(data)
        return name

    def _turn(self, folder, heights, color, title, failed, number) -> dict:
        code = CODE.format(heights=",".join(map(str, heights)), color=color, title=title)
        score = 0.0 if failed else float(np.clip(self.rng.normal(0.8, 0.15), 0, 1))
        judged = None
        if self.judge and not failed:
            judged = {"score": float(np.clip(score + self.rng.normal(0, 0.2), 0, 1)), "points": {}}
        hostile = number % 13 == 2
        thought = HOSTILE if hostile else f"bar, 1 series, {title}"
        parts = ("text", "layout", "type", "color", "overall")
        return {
            "response": response(thought, f"x = '{HOSTILE}'\n{code}" if hostile else code),
            "logps": [round(float(x), 4) for x in -self.rng.exponential(0.3, 40)],
            "finished": number % 17 != 6,
            "status": "error" if failed else "ok",
            "error": f"line 3\nNameError: {HOSTILE if hostile else 'ax'}" if failed else "",
            "flags": ["hidden_text"] if number % 19 == 7 else [],
            "replay": "undecided" if number % 23 == 8 else "",
            "render": None if failed else self._picture(folder, heights, color),
            "scores": dict.fromkeys(parts, score),
            "format": 1.0,
            "reward": score,
            "judge": judged,
        }


def evaluation(
    directory: Path,
    stage: str,
    seed: int,
    charts: int,
    gain: float,
    lost: float = 0.0,
    decoding: str = "greedy",
) -> None:
    """`evaluation.json`, and the trajectories that it was made of; of two evaluations of one seed
    the first turns of one are worse by what it `lost`. One that is sampled goes behind the greedy
    one.
    """
    rows = Maker(directory / "evaluation" / f"test-{decoding}", seed, False).write(0, charts, 1)
    rng = np.random.default_rng(seed)
    before = np.array([row["turns"][0]["scores"]["overall"] for row in rows])
    before = np.clip(before - lost, 0, 1)
    after = np.clip(before + rng.normal(gain, 0.02, charts), 0, 1)
    for number, (row, score) in enumerate(zip(rows, after, strict=True)):
        row["chart"] = f"test-{number:04d}"
        row["turns"][0]["scores"]["overall"] = float(before[number])
        row["turns"][1]["scores"]["overall"] = float(score)
    path = directory / "evaluation" / f"test-{decoding}" / "000000.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = directory / "evaluation.json"
    found = [] if decoding == "greedy" else json.loads(path.read_text())
    for turn, low in enumerate((before, after)):
        row = {"policy": stage, "set": "test", "decoding": decoding, "turn": turn + 1}
        row |= {"charts": charts, "exec_rate": 0.9, "low_level": float(low.mean())}
        row |= dict.fromkeys(("text", "layout", "type", "color"), 0.8)
        row["low_level_ci"] = list(bootstrap(low))
        if turn:
            gains = after - before
            row |= {"counted": charts, "improvement": float(gains.mean())}
            row["improvement_ci"] = list(bootstrap(gains))
            row |= {"improved": 0.2, "regressed": 0.1, "code_repeat": 0.05}
        found.append(row)
    path.write_text(json.dumps(found))


def metrics(directory: Path, stage: str, steps: int) -> None:
    """`metrics.jsonl` of an RL stage whose reward rises."""
    rng = np.random.default_rng(0)
    with open(directory / "metrics.jsonl", "w", encoding="utf-8") as f:
        for step in range(1, steps + 1):
            reward = 0.5 + 0.3 * step / steps + rng.normal(0, 0.03)
            row = {"stage": stage, "step": step, "time": 1.8e9 + step, "loss": rng.normal(0, 0.1)}
            row |= {"reward": reward, "turn1/reward": reward - 0.05, "turn2/reward": reward}
            row |= {"improvement": rng.normal(0.02, 0.01), "code_repeat": 0.1 + 0.6 * step / steps}
            row |= {"silent_groups": 0.4, "entropy": 0.3, "skipped": 0.0, "alarms": 0.0}
            row |= {"seconds/step": 2.0, "seconds/decode": 0.6, "seconds/execute": 0.8}
            row |= {"seconds/update": 0.4, "env/executions": 16.0 * step}
            f.write(json.dumps(row) + "\n")


def alarm(directory: Path, stage: str, step: int, name: str, state: str, value: float) -> None:
    """A row more of `alarms.jsonl`."""
    row = {"stage": stage, "step": step, "time": 1.8e9, "alarm": name, "state": state}
    with open(directory / "alarms.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(row | {"value": value, "threshold": 0.5}) + "\n")


def fake_run(
    workdir: Path, steps: int = 3, groups: int = 4, size: int = 4, charts: int = 12
) -> Path:
    """A run of two RL stages; the second wrote `steps` steps of `groups` x `size` trajectories."""
    for number, stage in enumerate(("stage1", "stage2")):
        directory = workdir / stage
        directory.mkdir(parents=True)
        config = {"stage": stage, "size": "tiny", "seed": 0, "model": {"preset": "tiny"}}
        config["data"] = {"dir": ""}
        (directory / "config.json").write_text(json.dumps(config))
        metrics(directory, stage, 60)
        evaluation(directory, stage, 7, charts, 0.1 * number)
    alarm(workdir / "stage2", "stage2", 20, "silent_groups", "begins", 0.95)
    alarm(workdir / "stage2", "stage2", 30, "silent_groups", "ends", 0.95)
    alarm(workdir / "stage2", "stage2", 50, "code_repeat", "begins", 0.6)
    maker = Maker(workdir / "stage2" / "trajectories", 1, judge=True)
    for step in range(1, steps + 1):
        maker.write(step, groups, size)
    return workdir
