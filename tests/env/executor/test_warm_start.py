"""Fonts that are read from memory. (test_pool and test_capture have settings, seeds, preloads.)"""

HEAD = "import matplotlib.pyplot as plt\nimport numpy as np\n"


def test_agg_reads_fonts_from_memory_and_the_others_by_path(pool):
    agg = """
import matplotlib.backends.backend_agg as b, matplotlib.font_manager as f
path = f.findfont('DejaVu Sans')
assert b.get_font(path) is b.get_font([path])
assert not isinstance(b.get_font(path).fname, str)
plt.plot([1, 2])
"""
    by_path = """
import io
plt.plot([1, 2])
plt.title('pdf and $x$')
for kind in ('pdf', 'svg', 'ps'):
    plt.savefig(io.BytesIO(), format=kind)
"""
    for result in pool.run([HEAD + agg, HEAD + by_path]):
        assert result.ok, result.error
