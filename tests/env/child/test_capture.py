"""The captured image against the PNG that matplotlib itself writes; which figure is captured."""

import ast
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax.env import EnvConfig, ExecutorPool, Status

DRAW = """
import matplotlib.pyplot as plt
import numpy as np
fig, axs = plt.subplots(1, 2, figsize=(4, 2.5))
axs[0].plot(np.arange(5) ** 2, 'o-', label='$x^2$')
axs[0].legend(); axs[0].set_ylabel('long label'); axs[0].set_title('T', fontstyle='italic')
axs[1].imshow(np.random.rand(4, 4), cmap='magma')
fig.text(0.98, 1.02, 'outside')
"""
PLAIN = "import matplotlib.pyplot as plt\nplt.figure(figsize=(2, 1))\nplt.plot([1, 2])\n"
RED = "import matplotlib.pyplot as plt\nfig = plt.figure(figsize=(1, 1), facecolor='red')\n"
GREEN = "other = plt.figure(figsize=(1, 1), facecolor='lime')\n"


def _color(execution):
    return execution.image[0, 0].tolist()


SAVES = [
    "plt.savefig(target)",
    "plt.savefig(target, bbox_inches='tight')",
    "plt.savefig(target, bbox_inches='tight', pad_inches=0.5)",
    "plt.savefig(target, facecolor='lightblue', edgecolor='k')",
    "plt.savefig(target, transparent=True)",
    "plt.tight_layout(); plt.savefig(target)",
    "fig.set_layout_engine('constrained'); plt.savefig(target)",
]
NATIVE = """
import matplotlib, numpy, sys
matplotlib.use('agg')
for i, save in enumerate({saves!r}):
    matplotlib.rcdefaults()
    numpy.random.seed(0)
    exec({draw!r} + save.replace('target', f'"{{sys.argv[1]}}/{{i}}.png", dpi=100'))
"""


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """What matplotlib writes for each of SAVES in a process of its own: RGBA images."""
    folder = tmp_path_factory.mktemp("native")
    subprocess.run(
        [sys.executable, "-c", NATIVE.format(saves=SAVES, draw=DRAW), str(folder)], check=True
    )
    return {save: Image.open(folder / f"{i}.png").convert("RGBA") for i, save in enumerate(SAVES)}


@pytest.mark.parametrize("save", SAVES)
def test_the_image_is_matplotlibs_own_png(pool, native, save):
    white = Image.new("RGBA", native[save].size, "white")
    expected = np.asarray(Image.alpha_composite(white, native[save]).convert("RGB")).astype(int)
    (result,) = pool.run([DRAW + save.replace("target", "'a.png'")])
    assert result.ok, result.error
    assert result.image.shape == expected.shape
    # rounding of the blend
    assert np.abs(result.image.astype(int) - expected).max() <= ("transparent" in save)


@pytest.mark.parametrize(
    "tail",
    [
        "",
        "plt.show()",
        "plt.savefig('a.png'); plt.close('all')",
        "plt.savefig('a.pdf', dpi=600)",
        "plt.savefig('no/such/folder/a.png')",
        "import io; b = io.BytesIO(); plt.savefig(b, format='svg'); assert "
        "b.getvalue().startswith(b'<?xml')",
        "import io; b = io.BytesIO(); plt.savefig(b); from PIL import Image; assert "
        "Image.open(b).size == (200, 100)",
        "plt.savefig('a.png', dpi=50); assert plt.imread('a.png').shape == (50, 100, 4)",
        "plt.savefig('a.png'); import os; assert os.path.getsize('a.png') > 100",
        "plt.gcf().canvas.print_png('a.png'); plt.close()",
        "plt.gcf().canvas.print_figure('a.png'); plt.close()",
        "import matplotlib; matplotlib.use('TkAgg'); plt.switch_backend('svg'); plt.show()",
        "import matplotlib.animation as a; a.FuncAnimation(plt.gcf(), lambda i: [], "
        "frames=3).save('a.gif', writer='pillow')",
        "import matplotlib.image; plt.gcf().canvas.draw(); plt.gcf().canvas.buffer_rgba()",
        "plt.pause(0.1)",
        "plt.gcf().show()",
        "import sys; plt.show(); sys.exit(0)",
    ],
)
def test_every_way_to_save_or_show_gives_the_same_image(pool, tail):
    plain, result = pool.run([PLAIN, PLAIN + tail])
    assert result.ok, result.error
    assert np.array_equal(result.image, plain.image)
    assert result.record == plain.record


def test_a_figure_without_pyplot(pool):
    code = """
from matplotlib.figure import Figure
f = Figure(figsize=(2, 1))
f.subplots().plot([1, 2])
f.savefig('a.png')
"""
    subfigure = """
import matplotlib.pyplot as plt
f = plt.figure(figsize=(2, 1))
f.subfigures(1, 2)[0].subplots().plot([1])
"""
    plain, own, part = pool.run([PLAIN, code, subfigure])
    assert np.array_equal(plain.image, own.image)
    assert part.ok and part.image.shape == plain.image.shape


def test_last_saved_then_last_shown_then_current(pool):
    codes = [
        RED + GREEN,
        RED + GREEN + "fig.savefig('a.png')",
        RED + GREEN + "fig.savefig('a.png'); other.savefig('b.png')",
        RED + "plt.show()\n" + GREEN,
        RED + "plt.savefig('a.png')\n" + GREEN + "plt.show()",
        RED + "plt.savefig('a.png')\nfig.set_facecolor('blue')",
        RED + "plt.close('all')",
    ]
    red, green = [255, 0, 0], [0, 255, 0]
    results = pool.run(codes)
    assert [_color(r) for r in results[:6]] == [green, red, green, red, red, red]
    assert results[6].status == Status.NO_FIGURE


def test_one_dpi_whatever_the_script_asks(pool):
    codes = [
        RED.replace("figsize", "dpi=300, figsize"),
        RED + "plt.savefig('a.png', dpi=600)",
        RED + "plt.rcParams['savefig.dpi'] = 300",
    ]
    assert [r.image.shape for r in pool.run(codes)] == [(100, 100, 3)] * 3


def test_too_large_a_figure_is_told_so(pool):
    (result,) = pool.run(["import matplotlib.pyplot as plt\nplt.figure(figsize=(100, 50))\n"])
    assert result.status == Status.ERROR
    assert (
        result.error
        == "ValueError: figure too large: 10000 x 5000 pixels; at most 4000000 in all are allowed"
    )


def test_an_error_while_drawing_names_the_line_that_saves(pool):
    code = "import matplotlib.pyplot as plt\nplt.title('$\\\\frac{1$')\nplt.savefig('a.png')\n"
    drawn, saved = pool.run([code.replace("plt.savefig('a.png')", ""), code])
    assert drawn.status == saved.status == Status.ERROR
    assert (
        saved.error.startswith("line 3, in <module>: plt.savefig('a.png')\nValueError: \n\\frac{1")
        and "Expected" in drawn.error
    )


def test_error_text_is_the_scripts_own_lines(pool):
    code = (
        "import numpy as np\nimport matplotlib.pyplot as plt\n\ndef draw(ax):\n    ax.plot([1, 2], "
        "colour='red')\n\n"
        "fig, ax = plt.subplots()\ndraw(ax)\n"
    )
    deep = "def f(n):\n    return f(n - 1) if n else 1 / 0\nf(9)\n"
    first, second, third = pool.run([code, deep, "import no_such_module"])
    assert first.error == (
        "line 8, in <module>: draw(ax)\nline 5, in draw: ax.plot([1, 2], colour='red')\n"
        "AttributeError: Line2D.set() got an unexpected keyword argument 'colour'"
    )
    assert second.error.count("\n") == 3 and second.error.endswith(
        "ZeroDivisionError: division by zero"
    )
    assert third.error == (
        "line 1, in <module>: import no_such_module\n"
        "ModuleNotFoundError: No module named 'no_such_module'"
    )


RANDOM = """
import random, numpy as np, matplotlib.pyplot as plt
values = [random.random(), np.random.rand(), np.random.default_rng().random()]
values += [np.random.RandomState().rand(), hash('a') % 97]
values += list({'x', 'yy', 'zzz', 'w'}).index('w'),
plt.figure(figsize=(2, 1)).text(0, 0.5, repr(values), fontsize=5)
plt.scatter(*np.random.default_rng().random((2, 20)))
"""


def test_the_same_bytes_again_and_in_another_executor(pool):
    first, again = pool.run([RANDOM, RANDOM + "\n"])
    with ExecutorPool(EnvConfig(workers=1, preload=("numpy", "matplotlib"))) as other:
        (elsewhere,) = other.run([RANDOM])
    assert (
        first.ok
        and np.array_equal(first.image, again.image)
        and np.array_equal(first.image, elsewhere.image)
    )


def test_only_the_fonts_of_matplotlib(pool):
    code = """
from matplotlib import font_manager as f
raise ValueError(*sorted({x.name[:4] for x in f.fontManager.ttflist}))
"""
    (result,) = pool.run([code])
    names = ast.literal_eval(result.error.split("ValueError: ")[1])
    known = ("DejaVu", "STIX", "cmb10", "cmex", "cmmi", "cmr10", "cmss", "cmsy", "cmtt")
    known += ("cmti", "Last Resort")  # since matplotlib 3.11
    assert "DejaVu"[:4] in names and set(names) <= {name[:4] for name in known}


def test_what_was_drawn_before_an_error_is_recorded_on_request(pool, styled_pool):
    code = (
        "import matplotlib.pyplot as plt\nplt.bar([0], [1])\nplt.title('half')\nraise ValueError\n"
    )
    (result,) = styled_pool.run([code])
    assert (
        result.status == Status.ERROR and result.image is None and result.record.types == {"bar": 1}
    )
    (plain,) = pool.run([code])
    assert plain.status == Status.ERROR and plain.record is None
