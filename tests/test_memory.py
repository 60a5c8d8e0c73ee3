"""The command: what it answers to a mistake. What it computes is in tests/planner."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--topology=v9-8", "no TPU slice 'v9-8'"),
        ("--programs=train", "stage2 has prefill, extend, decode, gradients, update"),
        ("--config.lora.rnk=3", "no such field: config.lora.rnk; did you mean lora.rank"),
        ("--config=configs/evaluate.py:tiny", "--config is of evaluate"),
    ],
)
def test_the_command_says_what_is_wrong(flag, message):
    command = [
        *(sys.executable, "-m", "mmrecoder_jax.memory"),
        *("--config=configs/stage2.py:tiny", "--topology=v5e-8", flag),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
