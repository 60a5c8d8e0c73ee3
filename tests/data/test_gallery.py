"""Gallery scripts: cells, what each needs of the cells before it, what is unfit to be a chart."""

import pytest

from mmrecoder_jax.data.benchmarks import RawChart, Skipped
from mmrecoder_jax.data.gallery import cell_codes, gallery_charts, standalone, unfit

SCRIPT = '''"""
=====
Demo
=====
Words.
"""

import matplotlib.pyplot as plt
import numpy as np
import os

np.random.seed(1)
x = np.arange(5)  # the data
unused = 3


# A comment of its own line.
def double(v):
    """Twice."""
    return 2 * v


fig, ax = plt.subplots()
ax.plot(x, label="# no comment")

# %%
# The second picture.

fig, ax = plt.subplots()
ax.bar(x, double(x))

####################
# More words.

# %%
ax.set_title("On the bars")
plt.show()
'''


def test_cells():
    first, second, third = cell_codes(SCRIPT)
    assert first == (
        "import matplotlib.pyplot as plt\nimport numpy as np\nimport os\n\nnp.random.seed(1)\nx = "
        "np.arange(5)\nunused = 3\n\n"
        'def double(v):\n    """Twice."""\n    return 2 * v\n\n'
        'fig, ax = plt.subplots()\nax.plot(x, label="# no comment")',
    )
    alone, so_far = second
    assert alone == (
        "import matplotlib.pyplot as plt\nimport numpy as np\nnp.random.seed(1)\nx = np.arange(5)\n"
        'def double(v):\n    """Twice."""\n    return 2 * v\n\n'
        "fig, ax = plt.subplots()\nax.bar(x, double(x))"
    )
    assert so_far == first[0] + "\n\nfig, ax = plt.subplots()\nax.bar(x, double(x))"
    assert third == (so_far + '\n\nax.set_title("On the bars")\nplt.show()',), (
        "it draws on the second picture, so it cannot stand alone"
    )


@pytest.mark.parametrize(
    ("earlier", "cell", "expected"),
    [
        (["a = 1\nb = a + 1\nc = 9"], "print(b)", "a = 1\nb = a + 1\n\nprint(b)"),
        (
            ["a = [1]\na.append(2)\na[0] = 5\nb = []"],
            "print(a)",
            "a = [1]\na.append(2)\na[0] = 5\n\nprint(a)",
        ),
        (["a = 1\na = 2"], "print(a)", "a = 2\n\nprint(a)"),
        (
            ["import a.b as c, d\nfor i in d.x: e = i"],
            "print(e)",
            "import a.b as c, d\nfor i in d.x: e = i\n\nprint(e)",
        ),
        (["a = 1"], "a = 2\nprint(a)", "a = 2\nprint(a)"),
        (["a = 1"], "for a in []: print(a)", "for a in []: print(a)"),
        (["fig, axs = plt.subplots(2)"], "axs[0].plot(1)", None),
        (["a = ax.plot(1)"], "print(a)", None),
    ],
)
def test_standalone(earlier, cell, expected):
    assert standalone(earlier, cell) == expected


def test_marker_inside_a_block_does_not_split():
    assert cell_codes("if 1:\n    a = 2\n# %%\n    b = 3\n") == [("if 1:\n    a = 2\n    b = 3",)]


def test_no_python():
    with pytest.raises(SyntaxError):
        cell_codes("print 'old'")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tips = sns.load_dataset('tips')", "needs data from the network"),
        ("import matplotlib.animation as animation", "is an animation"),
        ("from matplotlib.widgets import Slider", "needs a window"),
        ("from matplotlib.backends.backend_gtk3 import NavigationToolbar", "needs a window"),
        ("from matplotlib.backends.backend_agg import FigureCanvasAgg", None),
        ("plt.rcParams['text.usetex'] = True", "needs TeX"),
        ("ax.set_title('tkinter animation')", None),
    ],
)
def test_unfit(text, reason):
    assert unfit(text) == reason


def test_gallery_charts(tmp_path):
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "demo.py").write_text(SCRIPT)
    (tmp_path / "anim.py").write_text("from matplotlib import animation\n")
    (tmp_path / "old.py").write_text("print 'old'\n")
    found = list(gallery_charts(tmp_path, "lib-1", "Free"))
    assert found[0] == Skipped("lib-1/anim.py", "is an animation")
    assert found.pop().reason.startswith("is no Python")
    assert [item.id for item in found[1:]] == [
        "lib-1-lines_demo-01",
        "lib-1-lines_demo-02",
        "lib-1-lines_demo-03",
    ]
    assert all(
        isinstance(item, RawChart) and item.licence == "Free" and item.image is None
        for item in found[1:]
    )
    assert found[2].source == "lib-1/lines/demo.py#2"
