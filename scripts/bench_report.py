"""How large a report is and how long it takes: to make, and for a browser to load.

    python scripts/bench_report.py [--trajectories=10000] [--screenshots=DIR]

A run that was never run is made in a temporary folder: groups of 8 trajectories of two turns, 64 a
step, with pictures of 168 x 112 pixels, as `:tiny` draws them. Browser figures need Chromium.
Times are of this machine and its load; sizes are not.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mmrecoder_jax.reporting.report import write_one_file, write_report
from tests.browser import Browser, program
from tests.reporting.fake_run import fake_run

STEP = 64  # trajectories
MB = 1e6


def size(path: Path) -> float:
    """Megabytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--screenshots", type=Path, default=None, help="a folder for PNG files")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-report-") as folder:
        steps = -(-given.trajectories // STEP)
        run = fake_run(Path(folder) / "tiny", steps=steps, groups=8, size=8, charts=128)
        began = time.perf_counter()
        page = Path(write_report(run))
        print(f"trajectories in the run        {steps * STEP + 256}")
        print(f"made in                        {time.perf_counter() - began:.1f} s")
        print(f"report.html                    {size(page):.2f} MB")
        data = run / "report"
        print(f"report/, what is listed        {sum(map(size, data.rglob('list.js'))):.1f} MB")
        print(f"report/, all                   {size(data):.1f} MB")
        print(f"files in it                    {sum(p.is_file() for p in data.rglob('*'))}")
        print(
            f"pictures of the run            {size(run) - size(data) - size(page):.1f} MB, rows too"
        )
        one = Path(write_one_file(run, str(Path(folder) / "one.html")))
        print(f"a report of one file           {size(one):.2f} MB")
        if program() is not None:
            load(page, given.screenshots)


def load(path: Path, screenshots: Path | None) -> None:
    """Loads the page in a browser, works with it, and says how long it took."""
    with Browser() as browser:
        began = time.perf_counter()
        page = browser.open(path.as_uri())
        page.wait("document.body.dataset.ready")
        print(f"all listed in the browser      {time.perf_counter() - began:.1f} s")
        rows = page.js("state.rows.length")
        millis = page.js(
            "(() => {const t = performance.now(); document.getElementById('sort').value ="
            "'improvement, lowest'; refresh(); return performance.now() - t})()"
        )
        print(f"sorting and filtering {rows}    {millis:.0f} ms")
        began = time.perf_counter()
        page.js("open(0)")
        page.wait("document.querySelector('#one[open] .turns')")
        print(f"a trajectory opened            {1000 * (time.perf_counter() - began):.0f} ms")
        heap = page.call("Runtime.getHeapUsage")["usedSize"]
        print(f"memory of its script           {heap / MB:.0f} MB")
        if screenshots is not None:
            shoot(browser, path, screenshots)


def shoot(browser: Browser, path: Path, folder: Path) -> None:
    """Pictures of the page: its top, a trajectory; light and dark; on a desk and a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, width, height, dark in (
        ("desk", 1280, 900, False),
        ("desk-dark", 1280, 900, True),
        ("phone", 390, 800, False),
        ("phone-dark", 390, 800, True),
    ):
        page = browser.open(path.as_uri(), width, height, dark)
        page.wait("document.body.dataset.ready")
        page.screenshot(folder / f"{name}.png")
        page.js("document.getElementById('trajectories').scrollIntoView()")
        page.wait("[...document.querySelectorAll('#list img')].slice(0, 6).every(x => x.complete)")
        page.screenshot(folder / f"{name}-list.png")
        page.js("open(1)")
        page.wait("document.querySelector('#one[open] .turns')")
        page.wait("[...document.querySelectorAll('#one img')].every(x => x.complete)")
        page.screenshot(folder / f"{name}-one.png")


if __name__ == "__main__":
    main()
