"""Runs a script of this checkout as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_script(name: str, *flags: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """`python scripts/<name>.py FLAGS`; what it printed is text."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{name}.py", *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
