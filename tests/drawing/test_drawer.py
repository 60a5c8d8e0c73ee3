"""Drawing from Python."""

import subprocess
import sys

import pytest

import mmrecoder_jax
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.images import BadImage
from tests.drawing.scripted import chart
from tests.drawing.test_server import DRAWS, answers


def test_three_lines(tmp_path):
    path = tmp_path / "chart.png"
    path.write_bytes(chart().image)
    with answers("No code.", DRAWS, "No code.") as server:
        with mmrecoder_jax.drawer(server=server.url, model="m") as drawer:
            drawing = drawer.draw(str(path), turns=3)
            with pytest.raises(BadImage, match=r"missing\.png"):
                drawer.draw(str(tmp_path / "missing.png"))
            with pytest.raises(ConfigError, match="--select='nicest'"):
                drawer.draw(str(path), select="nicest")
            with pytest.raises(ConfigError, match="turns=0"):
                drawer.draw(str(path), turns=0)
        with pytest.raises(RuntimeError, match="inside its `with` block"):
            drawer.draw(str(path))
    assert drawing.code.startswith("import matplotlib") and drawing.choice.turn == 1
    assert drawing.render.shape[2] == 3 and len(drawing.samples[0].turns) == 3


def test_importing_the_package_loads_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import mmrecoder_jax\n"
        "found = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert found <= {'mmrecoder_jax', *sys.stdlib_module_names}, found\n"
        "assert [name for name in sys.modules if name.startswith('mmrecoder_jax.')] == []\n"
        "assert callable(mmrecoder_jax.drawer)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
