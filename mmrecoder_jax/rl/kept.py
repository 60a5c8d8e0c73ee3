"""A bound on what written trajectories take on disk (`rl.trajectory.write_trajectories`).

    steps on disk    5  10  15  20  25        too much by two steps
    afterwards       5          20  25        the first stays, to compare with

A step goes with its pictures: first its rows, then `renders/<step>/`, so that no row is left
without its picture; what a kill leaves between the two goes the next time.
"""

import os
import shutil

from mmrecoder_jax.learner import distributed


def keep_below(directory: str, most_bytes: float) -> list[str]:
    """Removes the oldest steps but the first until the rest is small enough; the newest stays.

    All hosts call this together, when they have written; the main one removes.

    Returns:
      Names of the steps that were removed here.
    """
    removed: list[str] = []
    with distributed.together():
        if distributed.is_main():
            renders = os.path.join(directory, "renders")
            names = sorted(os.listdir(directory))
            steps = [name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl")]
            for left_over in set(_folders(renders)) - set(steps):
                shutil.rmtree(os.path.join(renders, left_over))
            sizes = {step: _size(directory, step) for step in steps}
            total = sum(sizes.values())
            for step in steps[1:-1]:
                if total <= most_bytes:
                    break
                os.unlink(os.path.join(directory, f"{step}.jsonl"))
                shutil.rmtree(os.path.join(renders, step), ignore_errors=True)
                total -= sizes[step]
                removed.append(step)
    return removed


def _folders(renders: str) -> list[str]:
    return [entry.name for entry in os.scandir(renders) if entry.is_dir()]


def _size(directory: str, step: str) -> int:
    """Bytes of a step's rows and pictures. Earlier versions had the pictures of all in one folder,
    which are not counted.
    """
    total = os.path.getsize(os.path.join(directory, f"{step}.jsonl"))
    folder = os.path.join(directory, "renders", step)
    if os.path.isdir(folder):
        total += sum(entry.stat().st_size for entry in os.scandir(folder))
    return total
