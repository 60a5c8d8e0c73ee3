"""Replays: the same pixels as drawn, texts that cannot be seen, and display lists that lie."""

import numpy as np
import pytest

from mmrecoder_jax.env import EnvConfig, ExecutorPool
from mmrecoder_jax.env.chartmimic import score

HEAD = """\
import matplotlib.pyplot as plt
import numpy as np
import matplotlib.patches as p
fig, ax = plt.subplots(figsize=(3, 2))
"""
HONEST = [
    "ax.bar(['a', 'b'], [1, 2], hatch='//', "
    "label='k')\nax.set_title('Title')\nax.legend()\nax.grid(True)",
    "ax.plot([1, 2], 'o--')\nax.set_xlabel('$x_i^2$')\nax.annotate('here', (0, 1), "
    "arrowprops={'arrowstyle': '->'}, rotation=30)",
    "ax.scatter(*np.random.rand(2, 9), c=np.arange(9), "
    "s=50)\nax.set_title('t')\nplt.savefig('a.png', bbox_inches='tight')",
    "ax.imshow(np.random.rand(3, 3))\nax.text(1, 1, 'on top', "
    "color='w')\nplt.colorbar(ax.images[0])",
    "ax.contourf(np.random.rand(4, 4))\nax.pcolormesh(np.random.rand(3, 3), "
    "shading='gouraud')\nax.pie([1, 2], labels=['x', 'y'])",
    "plt.close()\nwith plt.xkcd(): plt.plot([1, 2]); plt.title('hand drawn')",
    "ax = plt.figure().add_subplot(projection='3d')\nax.plot_surface(*np.meshgrid([1, 2], [1, 2]), "
    "np.ones((2, 2)))\nax.set_title('3d')",
    "ax.fill_between([0, 1], [1, 2], clip_path=p.Circle((0.5, 1), 0.4, "
    "transform=ax.transData))\nax.set_yscale('log')\nax.set_title('c')",
]
HIDDEN = [
    "for word in ('secret', 'Harvest', 'tonnes'): ax.text(0.5, 0.5, word)",
    "ax.text(0.5, 0.5, 'secret')\nax.axhspan(0, 1, color='black', zorder=9)",
    "ax.set_title('secret')\nfig.patches.append(p.Rectangle((0, 0), 1, 1, "
    "transform=fig.transFigure, figure=fig, color='k', zorder=99))",
    "ax.text(0.5, 0.5, 'secret', fontsize=9)\nax.text(0.45, 0.45, 'M' * 9, fontsize=20, "
    "weight='bold', backgroundcolor='g', zorder=9)",
]
# What a script that knows of the replay may say instead.
PATCH = """\
import sys
d = sys.modules['mmrecoder_jax.env.child.display_list']
ax.bar([1], [1])
ax.set_title('T')
"""
CLAIM = """\
c = sys.modules['mmrecoder_jax.env.child.capture']
take = c.Capture._take
def lie(self, *a, **k):
    take(self, *a, **k)
    {}
"""
LIES = {  # script: the flag it gets, what becomes of its replay
    CLAIM.format("self.pixels = bytes(len(self.pixels))") + "c.Capture._take = lie": (
        "forged",
        "done",
    ),
    CLAIM.format("self.record['texts'].append('never drawn')") + "c.Capture._take = lie": (
        "forged",
        "done",
    ),
    CLAIM.format("self.record['types']['pie'] = 1") + "c.Capture._take = lie": ("forged", "done"),
    CLAIM.format("self.record['colors'].append('bar--#FF0000')") + "c.Capture._take = lie": (
        "forged",
        "done",
    ),
    CLAIM.format("self.record['layout'].append([1, 2, 0, 0, 1, 1])") + "c.Capture._take = lie": (
        "forged",
        "done",
    ),
    # the zygote's own reference to `taken` is used
    "d.taken = lambda: bytes\nc = sys.modules['mmrecoder_jax.env.child.capture']": (
        "",
        "done",
    ),
    CLAIM.format("self.display = bytes") + "c.Capture._take = lie": ("", "undecided"),
    CLAIM.format("self.display = lambda: bytes(1000)") + "c.Capture._take = lie": ("", "undecided"),
    CLAIM.format("own = self.display; self.display = lambda: own()[:-9] + bytes(9 << 20)")
    + "c.Capture._take = lie": (
        "",
        "done",
    ),
    CLAIM.format(
        "own = self.display; self.display = lambda: own().replace(b'draw_path', b'__class__')"
    )
    + "c.Capture._take = lie": ("", "undecided"),
    CLAIM.format("own = self.display; self.display = lambda: own().replace(b'float64', b'complex')")
    + "c.Capture._take = lie": ("", "undecided"),
}


@pytest.fixture(scope="module")
def replaying():
    with ExecutorPool(
        EnvConfig(workers=1, preload=("numpy", "matplotlib"), replay_share=1.0)
    ) as pool:
        yield pool


@pytest.mark.parametrize("script", HONEST)
def test_an_honest_chart_is_replayed_pixel_by_pixel(replaying, pool, script):
    (result,) = replaying.run([HEAD + script])
    (plain,) = pool.run([HEAD + script])
    assert result.ok and (result.replay, result.flags) == ("done", ()), result.error
    assert np.array_equal(result.image, plain.image) and result.record == plain.record


@pytest.mark.parametrize("script", HIDDEN)
def test_a_text_that_cannot_be_read_is_found_where_it_is_claimed(replaying, script):
    claim = CLAIM.format("self.record['texts'].append('secret')") + "c.Capture._take = lie\n"
    honest, forged = replaying.run([HEAD + script, HEAD + PATCH + claim + script])
    assert "secret" not in honest.record.texts and honest.flags == ()
    assert forged.record is None and {"hidden_text", "forged"} <= set(forged.flags)


@pytest.mark.parametrize("script", LIES)
def test_a_picture_or_record_that_does_not_follow_from_the_drawing(replaying, script):
    flag, replay = LIES[script]
    (result,) = replaying.run([HEAD + PATCH + script])
    assert result.ok, result.error
    assert result.replay == replay and set(result.flags) - {"tamper"} == ({flag} if flag else set())


def test_a_record_that_is_put_in_place_of_the_recorders_scores_nothing(replaying, pool):
    """A script that walks the frames finds the capture, and writes the target's record into it."""
    (target,) = pool.run([HEAD + "ax.bar([1], [1], color='crimson')\nax.set_title('Harvest')"])
    walk = (
        "fig.text(0.4, 0.5, 'hello')\nplt.savefig('x.png')\nimport sys\nframe = sys._getframe()\n"
        "while frame:\n    captured = frame.f_locals.get('captured')\n"
        f"    if captured is not None:\n        captured.record = {target.record.to_json()!r}\n"
        "    frame = frame.f_back"
    )
    (forged,) = replaying.run([HEAD + walk])
    assert forged.ok and forged.record is None and "forged" in forged.flags
    assert score(forged.record, target.record).overall == 0.0


def test_what_cannot_be_replayed_is_counted(replaying):
    before = replaying.stats()
    filtered = "ax.plot([1, 2])[0].set_agg_filter(lambda image, dpi: (image, 0, 0))"
    by_file = "from matplotlib import font_manager as f\npath = f.findfont('DejaVu Sans')\n"
    by_file += "ax.set_title('T', font=f.FontProperties(fname=path))"
    for result in replaying.run([HEAD + filtered, HEAD + by_file]):
        assert result.ok and result.replay == "undecided", result.error
    after = replaying.stats()
    assert after["replays_undecided"] - before["replays_undecided"] == 2
    assert after["rate_hidden_text"] == after.get("flag_hidden_text", 0) / after["replays"]


def test_damaged_display_lists_bring_nothing_down(replaying):
    """Bytes of the list changed, cut and doubled at random.

    A replay may find a forgery or give up, and the executors go on.
    """
    damage = CLAIM.format("""import random
    r = random.Random({seed})
    data = bytearray(self.display())
    for _ in range(r.randint(1, 6)):
        anywhere = r.random() < 0.5
        data[r.randrange(len(data) if anywhere else 9000)] = r.randrange(256)
    at = r.randrange(len(data))
    data = bytes(r.choice([data, data[:at], data + data[at:]]))
    self.display = lambda: data""")
    chart = HEAD + PATCH + "ax.legend(['k'])\n"
    before = replaying.stats()
    results = replaying.run(
        [
            chart + damage.replace("{seed}", str(seed)) + "c.Capture._take = lie"
            for seed in range(40)
        ]
    )
    assert all(
        result.ok and set(result.flags) <= {"tamper", "forged", "hidden_text"} for result in results
    )
    assert sum(result.replay == "undecided" for result in results) >= 10
    assert replaying.stats()["respawns"] == before["respawns"]
    (honest,) = replaying.run([HEAD + HONEST[0] + "\n"])
    assert honest.replay == "done" and not honest.flags


def test_a_share_is_replayed():
    with ExecutorPool(EnvConfig(workers=1, preload=(), replay_share=0.5)) as pool:
        results = pool.run(
            [
                f"import matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1)).text(0, 0, {i})\n"
                for i in range(20)
            ]
        )
        done = sum(result.replay == "done" for result in results)
        assert done == pool.stats()["replays"] and 4 <= done <= 16
