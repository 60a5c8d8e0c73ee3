"""What is handed out ready is what matplotlib would have made: the same pixels and record as where
nothing may be handed out.
"""

import numpy as np
import pytest

HEAD = "import matplotlib.pyplot as plt\nimport numpy as np\nx = np.arange(5)\n"
# A setting that changes no picture, but with which nothing is handed out.
AS_EVER = "plt.rcParams['figure.max_open_warning'] = 99\n"
SCRIPTS = [
    "fig, ax = plt.subplots(figsize=(3, 2))\nax.plot(x, x ** 2)\nax.set_title('T')\nax.grid(True)",
    "plt.figure(figsize=[4, 3])\nplt.bar(['a', 'b'], [1, "
    "2])\nplt.xticks(rotation=45)\nplt.ylabel('y')",
    "plt.plot(x)\nplt.subplots_adjust(left=0.3)\nplt.tick_params(axis='x', direction='in', "
    "colors='red')",
    "fig, axs = plt.subplots(2, 3)\nfor ax in axs.flat: ax.scatter(x, x)\nfig.tight_layout()",
    "fig, axs = plt.subplots(2, 1, sharex=True)\naxs[0].plot(x)\naxs[1].hist(x)",
    "ax = plt.subplot(211)\nax.plot(x)\nax = plt.subplot(2, 1, 2, projection='polar')\nax.plot(x, "
    "x)",
    "fig, ax = plt.subplots()\nax.plot(x - 2, x - "
    "2)\nax.spines['bottom'].set_position('zero')\nax.spines['left'].set_position('center')",
    "fig, ax = plt.subplots()\nplt.setp(ax.get_xticklabels(), rotation=40, color='b')\nax.plot(x * "
    "1e4, x)\nax.set_xlim(0, 9e4)",
    "fig, ax = plt.subplots()\nax.semilogy(x + 1, 10.0 ** x)\nother = "
    "ax.twinx()\nother.plot(-x)\nax.xaxis.tick_top()",
    "fig, ax = "
    "plt.subplots()\nax.plot(x)\nax.xaxis.get_major_ticks()[1].label1.set_color('red')\nax.set_yticks(range(20))",
    "fig, ax = plt.subplots()\nax.clear()\nax.barh(x, "
    "x)\nax.xaxis.set_tick_params(labelsize=6)\nax.remove()\nplt.subplot().plot(x)",
    "fig = plt.figure()\nax = fig.add_subplot(fig.add_gridspec(2, 2, hspace=1)[:, "
    "1])\nax.imshow(np.eye(3))\nplt.colorbar(ax.images[0])",
    "plt.rc('axes', prop_cycle=plt.cycler(color=plt.cm.viridis(np.linspace(0, 1, "
    "3))))\nplt.subplots()[1].plot(x)",
    "plt.close()\nplt.figure()\nplt.close()\nplt.pie([1, 2], labels=['a', 'b'])\nplt.text(0, 0, "
    "'$x^2$ é', style='italic')",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_with_and_without(pool, script):
    ready, as_ever = pool.run([HEAD + script, HEAD + AS_EVER + script])
    assert ready.ok and as_ever.ok, ready.error + as_ever.error
    assert np.array_equal(ready.image, as_ever.image) and ready.record == as_ever.record
    assert ready.flags == ()


def test_things_are_handed_out_once_and_only_to_scripts_without_settings_of_their_own(pool):
    look = "import matplotlib.pyplot as plt\ncells = [cell.cell_contents for cell in plt.new_figure_manager.__closure__]\n"
    look += "(reserve,) = [each for each in cells if type(each).__name__ == 'Reserve']\n"
    show = "raise ValueError(len(reserve._axes), reserve._manager is None)\n"
    cases = {
        "plt.subplots()\n": "(3, True)",
        "plt.subplots(2, 3)\nplt.subplots()\n": "(0, True)",
        "plt.subplots(sharex=True, sharey=True)\n": "(3, True)",
        "plt.figure(dpi=50).add_subplot()\n": "(4, False)",
        "plt.rcParams['axes.facecolor'] = 'red'\nplt.subplots()\n": "(4, False)",
        "plt.rcParams['font.sans-serif'].insert(0, 'Arial')\nplt.subplots()\n": "(4, False)",
        "plt.figure(3)\nplt.subplot(projection='3d')\n": "(4, False)",
    }
    for code, kept in cases.items():
        (result,) = pool.run([look + code + show])
        assert result.error.endswith(f"ValueError: {kept}"), (code, result.error)


def test_errors_are_those_of_matplotlib(pool):
    codes = [
        "plt.subplot(2, 1, 5)",
        "plt.figure().add_subplot(999)",
        "plt.figure(figsize=(0, 1))",
        "plt.figure(figsize=(1, 2, 3))",
        "plt.subplots(colour='red')",
        "plt.figure().add_subplot(1, 1)",
    ]
    ready = pool.run([HEAD + code for code in codes])
    as_ever = pool.run([HEAD + AS_EVER + code for code in codes])
    for mine, theirs in zip(ready, as_ever, strict=True):
        assert (
            mine.status == theirs.status and mine.error.replace("line 4", "line 5") == theirs.error
        )


def test_agg_reads_fonts_from_memory_and_the_others_by_path(pool):
    agg = "import matplotlib.backends.backend_agg as b, matplotlib.font_manager as f\npath = f.findfont('DejaVu Sans')\n"
    agg += "assert b.get_font(path) is b.get_font([path]) and not isinstance(b.get_font(path).fname, str)\n"
    by_path = "import io\nplt.plot(x)\nplt.title('pdf and $x$')\nfor kind in ('pdf', 'svg', 'ps'): plt.savefig(io.BytesIO(), format=kind)\n"
    for result in pool.run([agg + HEAD + "plt.plot(x)", HEAD + by_path]):
        assert result.ok, result.error
