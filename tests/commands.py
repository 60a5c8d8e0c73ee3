"""Runs a command of the package as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}


def run_command(name: str, *flags: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m mmrecoder_jax.<name> FLAGS`; what it printed is text."""
    return subprocess.run(
        [sys.executable, "-m", f"mmrecoder_jax.{name}", *flags],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
