"""What is handed out ready is what matplotlib would have made.

Pixels and record are the same as where nothing may be handed out.
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


# Counts what is made in the script's own process: what is handed out was made before the fork.
COUNT = """
import matplotlib.axes, matplotlib.figure
made = {"figures": 0, "axes": 0}
def counted(cls, name):
    init = cls.__init__
    def count(self, *args, **kwargs):
        made[name] += 1
        init(self, *args, **kwargs)
    cls.__init__ = count
counted(matplotlib.figure.Figure, "figures")
counted(matplotlib.axes.Axes, "axes")
"""
SHOW = "raise ValueError(made['figures'], made['axes'])\n"


@pytest.mark.parametrize(
    ("code", "made"),
    [
        ("plt.subplots()", "(0, 0)"),
        ("plt.subplots(2, 3)\nplt.subplots()", "(1, 3)"),  # four of seven axes were ready
        ("plt.subplots(sharex=True, sharey=True)", "(0, 0)"),
        ("plt.figure(dpi=50).add_subplot()", "(1, 1)"),
        ("plt.rcParams['axes.facecolor'] = 'red'\nplt.subplots()", "(1, 1)"),
        ("plt.rcParams['font.sans-serif'].insert(0, 'Arial')\nplt.subplots()", "(1, 1)"),
        ("plt.figure(3)\nplt.subplot(projection='3d')", "(1, 1)"),
    ],
)
def test_things_are_handed_out_once_and_only_where_matplotlib_would_make_the_same(pool, code, made):
    (result,) = pool.run([HEAD + COUNT + code + "\n" + SHOW])
    assert result.error.endswith(f"ValueError: {made}"), result.error


def test_ticks_are_handed_out(pool):
    count = """
import matplotlib.axis
made = []
init = matplotlib.axis.XTick.__init__
matplotlib.axis.XTick.__init__ = lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1]
ax = plt.subplots()[1]
ax.plot(x)
plt.gcf().canvas.draw()
raise ValueError(len(made))
"""
    ready, as_ever = pool.run([HEAD + count, HEAD + AS_EVER + count])
    # matplotlib 3.11 makes one itself
    assert ready.error.endswith(("ValueError: 0", "ValueError: 1")), ready.error
    assert int(as_ever.error.rsplit(" ", 1)[1]) >= 5, as_ever.error


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
