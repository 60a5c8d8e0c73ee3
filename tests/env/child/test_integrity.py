import pytest

HONEST = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(2, 1))\nax.bar([1, 2], [3, 4])\nax.set_title('T')\n"


@pytest.mark.parametrize(
    "patch",
    [
        "from matplotlib.axes import Axes; Axes.bar = Axes.plot",
        "from matplotlib.text import Text; Text.draw = lambda *a: None",
        "from matplotlib.backends.backend_agg import RendererAgg; RendererAgg.draw_text = lambda "
        "*a, **k: None",
        "from matplotlib.figure import Figure; draw = Figure.draw; Figure.draw = lambda *a: "
        "draw(*a)",
        "import sys; sys.modules['mmrecoder_jax.env.child.recorder'].describe = lambda *a: None",
        "import sys; sys.modules['mmrecoder_jax.env.child.capture'].Capture.finish = lambda *a: None",
        "del __import__('matplotlib').patches.Patch.draw",
    ],
)
def test_a_changed_library_is_flagged(pool, patch):
    (result,) = pool.run([HONEST + patch])
    assert result.flags == ("tamper",)


def test_an_honest_script_is_not_flagged(pool):
    three_d = "import matplotlib.pyplot as plt\nax = plt.figure().add_subplot(projection='3d')\nax.plot([1, 2], [1, 2], [1, 2])\n"
    own = "from matplotlib.axes import Axes\nclass Mine(Axes):\n    name = 'mine'\n    def bar(self): pass\n"
    own += "import matplotlib.projections as p\np.register_projection(Mine)\n"
    own += "import matplotlib.pyplot as plt\nplt.subplot(projection='mine')\n"
    style = "import matplotlib.pyplot as plt\nplt.style.use('ggplot')\nwith plt.xkcd(): plt.plot([1])\nplt.rcdefaults()\n"
    for result in pool.run([HONEST, three_d, own, style]):
        assert result.ok and result.flags == (), result.error
