"""Scripts that change the library or the recorder are flagged; honest ones are not."""

import pytest

HONEST = """\
import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(2, 1))
ax.bar([1, 2], [3, 4])
ax.set_title('T')
"""


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
        "import sys; c = sys.modules['mmrecoder_jax.env.child.capture']\n"
        "c.Capture.finish = lambda *a: None",
        "del __import__('matplotlib').patches.Patch.draw",
    ],
)
def test_a_changed_library_is_flagged(pool, patch):
    (result,) = pool.run([HONEST + patch])
    assert result.flags == ("tamper",)


def test_an_honest_script_is_not_flagged(pool):
    three_d = """
import matplotlib.pyplot as plt
ax = plt.figure().add_subplot(projection='3d')
ax.plot([1, 2], [1, 2], [1, 2])
"""
    own = """
from matplotlib.axes import Axes
class Mine(Axes):
    name = 'mine'
    def bar(self): pass
import matplotlib.projections as p
p.register_projection(Mine)
import matplotlib.pyplot as plt
plt.subplot(projection='mine')
"""
    style = """
import matplotlib.pyplot as plt
plt.style.use('ggplot')
with plt.xkcd(): plt.plot([1])
plt.rcdefaults()
"""
    for result in pool.run([HONEST, three_d, own, style]):
        assert result.ok and result.flags == (), result.error
