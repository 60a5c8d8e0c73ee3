"""Ways to have a series or a text counted that nobody can see.

Each is tried in a real executor, and none works.
"""

import pytest

from mmrecoder_jax.env.chartmimic import score
from mmrecoder_jax.env.records import Record

START = (
    "import matplotlib.patheffects as pe\n"
    "import matplotlib.pyplot as plt\nimport numpy as np\nfig, ax = plt.subplots(figsize=(4, "
    "3))\nax.plot([0, 1], [1, 2], color='red')\n"
)
CELL = (1, 1, 0, 0, 0, 0)


# Attempts to have a series counted that nobody sees, as a person who wants the score makes them.
TRICKS = [
    # nothing to draw
    "ax.scatter([0.5], [1.5], s=0)",
    "ax.scatter([0.5], [1.5], s=[0.0])",
    "ax.scatter([np.nan], [1.5])",
    "ax.scatter([0.5], [1.5], marker='')",
    "ax.scatter([0.5], [1.5], facecolors='none', edgecolors='none')",
    "ax.scatter([0.5], [1.5], facecolors='none', linewidths=0)",
    "ax.plot([0, 1], [2, 1], ls=(0, (0, 9e9)))",
    "ax.plot([0, 1], [2, 1], ls=(9e3, (0.001, 9e5)))",
    "ax.plot([0, np.nan, 1], [2, 1, 1])",
    "ax.plot([0, 1], [2, 1], 'o', ls='', markevery=[])",
    "ax.plot([0, 1], [2, 1], ls='', marker='None')",
    "ax.plot([0, 0], [1, 1], solid_capstyle='butt')",
    "ax.plot([0, 1], [2, 1]); ax.lines[-1].set_data([], [])",
    "ax.bar([0.5], [0])",
    "ax.bar([0.5], [np.nan])",
    "ax.bar([0.5], [1.5], width=0)",
    "ax.bar([0.5], [1.5], fill=False, lw=0)",
    "ax.fill_between([0, 1], [1, 1], [1, 1])",
    "ax.fill_between([0, 1], [1, 2], where=[False, False])",
    "ax.imshow(np.full((3, 3), np.nan), extent=(0, 1, 1, 2), aspect='auto')",
    "ax.imshow(np.zeros((3, 3, 4)), extent=(0, 1, 1, 2), aspect='auto')",
    "ax.imshow(np.eye(3), extent=(0, 1, 1, 2), aspect='auto', alpha=np.zeros((3, 3)))",
    "ax.pcolormesh([0, 1], [1, 2], np.ma.masked_all((1, 1)))",
    "ax.pie([1, 0], colors=['white', 'blue'], radius=0.2, center=(0.5, 1.5), "
    "wedgeprops={'lw': 0})\nax.set(xlim=(-0.05, 1.05), ylim=(0.95, 2.05), aspect='auto')",
    "ax.contour([0, 1], [1, 2], np.eye(2), levels=[5, 6])",
    "ax.errorbar([0.5], [1.5], yerr=0, fmt='none', elinewidth=0)",
    "ax.hist([], bins=3)",
    "ax.quiver([0.5], [1.5], [0], [0], minlength=0, minshaft=0, width=0)",
    "ax.stackplot([0, 1], [[0, 0]], baseline='zero')",
    "ax.hlines([1.5], 0, 1, lw=0)",
    "ax.eventplot([0.5], linelengths=0, lineoffsets=1.5)",
    # out of sight
    "ax.plot([-9, -9, 9], [-9, 9, 9]); ax.set(xlim=(0, 1), ylim=(1, 2))",
    "ax.bar([-9], [9], 0.1); ax.bar([9], [9], 0.1); ax.set(xlim=(0, 1), ylim=(1, 2))",
    "ax.scatter([-1, 2], [0, 3]); ax.set(xlim=(0, 1), ylim=(1, 2))",
    "ax.scatter([0.5], [1.5], transform=fig.dpi_scale_trans + ax.transData)\n"
    "ax.set(xlim=(-0.05, 1.05), ylim=(0.95, 2.05))",
    "a = fig.add_axes([0.3, 0.3, 0.3, 0.3], polar=True, rmax=1); a.set_axis_off()\n"
    "a.patch.set_visible(False); a.scatter([1], [9], clip_on=True); a.set_rlim(0, 1)",
    "a = fig.add_axes([0.3, 0.3, 0.3, 0.3], zorder=-9); a.bar([0], [1])",
    "a = ax.inset_axes([0.2, 0.2, 0.3, 0.3]); a.bar([0], [1]); a.set_visible(False)",
    "a = ax.twinx(); a.bar([0.5], [1.5]); a.set_visible(False)",
    "ax.bar([0.5], [1.5], zorder=-9); ax.axhspan(0.9, 2.2, color='white', zorder=-8)\n"
    "ax.set(xlim=(-0.05, 1.05), ylim=(0.95, 2.05)); ax.patches[-1].remove()\n"
    "ax.bar([0.5], [1.5], color='white')",
    # a draw of its own
    "ax.scatter([0.5], [1.5]).draw = lambda renderer: None",
    "class P(type(ax.patch)):\n    def draw(self, renderer): pass\n"
    "ax.bar([0.5], [1.5])[0].__class__ = P",
    "ax.scatter([0.5], [1.5], path_effects=[])\n"
    "ax.collections[-1].set_path_effects([pe.Stroke(linewidth=0, foreground='white')])\n"
    "ax.collections[-1].set(linewidths=0, alpha=0.02)",
    "ax.plot([0, 1], [2, 1], path_effects=[pe.SimpleLineShadow(alpha=0)])",
    "ax.bar([0.5], [1.5], in_layout=False).patches[0].set_clip_path(\n"
    "    plt.Circle((0.5, 1.5), 1e-6, transform=ax.transData))",
    "ax.bar([0.5], [1.5], alpha=0.5)[0].set_alpha(0.001)",
    "ax.bar([0.5], [1.5], color='#00000003')",
    "ax.imshow(np.eye(3), cmap='gray', vmin=-1e9, vmax=0, extent=(0, 1, 1, 2), aspect='auto', "
    "alpha=0.01)",
]


@pytest.fixture
def record(pool):
    def record(body: str) -> Record:
        execution = pool.submit(START + body).result()
        assert execution.ok, execution.error
        return execution.record

    return record


@pytest.mark.parametrize(
    "hidden",
    [
        "ax.bar([0.5], [1.5], alpha=0.01)",
        "ax.bar([0.5], [1.5], color='white')",
        "ax.bar([0.5], [1.5], color=(0, 0, 1, 0.03))",
        "ax.scatter([0.5], [1.5], color='#FCFCFC')",
        "ax.plot([0, 1], [2, 1], color='white', marker='o')",
        "ax.plot([0, 1], [2, 1], lw=0.02)",
        "ax.fill_between([0, 1], [1, 2], alpha=0.02)",
        "ax.imshow(np.eye(3), extent=(0, 1, 1, 2), alpha=0.02)",
        "ax.plot([0.5], [1.5], 'o', ms=0.5)",
        "ax.scatter([0.5], [1.5], s=0.3)",
        "ax.bar([0.5], [1e-9], 1e-9)",
        "ax.bar([0.5], [1e-9])",
        "ax.fill_between([50, 60], [1, 2]); ax.set_xlim(0, 1)",
        "ax.vlines([50], 0, 1); ax.set_xlim(0, 1)",
        "ax.imshow(np.eye(3), extent=(50, 51, 1, 2), aspect='auto'); ax.set_xlim(0, 1)",
        "ax.pcolormesh([50, 51, 52], [1, 2], [[1, 2]]); ax.set_xlim(0, 1)",
        "ax.quiver([50], [1], [1], [1]); ax.set_xlim(0, 1)",
        "ax.hexbin([50, 51], [1, 2], gridsize=3); ax.set_xlim(0, 1)",
        "ax.bar([0.5], [1.5])[0].set_clip_path(plt.Rectangle((50, 50), 1, 1, "
        "transform=ax.transData))",
        "import matplotlib.transforms as tr\nax.bar([0.5], [1.5])[0].set_clip_box(tr.Bbox([[1, 1], "
        "[2, 2]]))",
        "ax.bar([0.5], [1.5])[0].set_agg_filter(lambda image, dpi: (0 * image, 0, 0))",
        "fig.add_axes([2, 2, 1, 1]).bar([1], [1])",
        "fig.add_axes([0, 0, 0.005, 0.005]).bar([1], [1])",
        *TRICKS,
    ],
)
def test_a_series_that_cannot_be_seen_is_no_type_and_no_color(record, hidden):
    drawn = record(hidden)
    assert (drawn.types, drawn.colors, drawn.layout) == ({"plot": 1}, ("plot--#FF0000",), (CELL,))


@pytest.mark.parametrize(
    ("shown", "kind", "color"),
    [
        ("ax.set_facecolor('black'); ax.bar([0.5], [1.5], color='white')", "bar", "#FFFFFF"),
        ("ax.bar([0.5], [1.5], color='white', edgecolor='black')", "bar", "#FFFFFF"),
        (
            "ax.bar([0.5], [1.5], color='white', hatch='/', edgecolor='black', lw=0)",
            "bar",
            "#FFFFFF",
        ),
        (
            "ax.contour([0, 1], [1, 2], np.eye(2), colors='white'); ax.axhspan(1, 2, "
            "color='black')",
            "contour",
            "#FFFFFF",
        ),
        ("ax.scatter([0.5], [1.5], color='blue', s=9)", "scatter", "#0000FF"),
        ("ax.plot([0.5], [1.5], 'o', color='blue')", "plot", "#0000FF"),
        ("ax.axvline(0.5, color='blue', lw=0.5)", "axvline", "#0000FF"),
        ("ax.bar([0.5], [1.5], color='blue', alpha=0.3)", "bar", "#0000FF"),
        (
            "ax.bar([0.5], [1.5], color='blue')[0].set_clip_path(plt.Rectangle((0, 1), 1, 0.3, "
            "transform=ax.transData))",
            "bar",
            "#0000FF",
        ),
        (
            "ax.add_patch(plt.Rectangle((0, 1), 1, 1, color='k')); ax.plot([0, 1], [2, 1], "
            "color='white', zorder=9)",
            "plot",
            "#FFFFFF",
        ),
        (
            "ax.eventplot(np.linspace(0, 1, 30), lineoffsets=1, linelengths=0.02, color='blue')",
            "eventplot",
            "#0000FF",
        ),
        (
            "ax.plot(np.linspace(0, 1, 30), np.full(30, 1.0), '|', color='blue', ms=4)",
            "plot",
            "#0000FF",
        ),
        (
            "ax.scatter([0.5, 0.6], [1.5, 1.2], facecolors='none', edgecolors='blue', s=16)",
            "scatter",
            "#0000FF",
        ),
        ("ax.plot([0, 1], [2, 1], ls=':', lw=0.5, color='blue')", "plot", "#0000FF"),
        ("ax.bar(np.linspace(0, 1, 200), 1.5, 0.002, color='blue')", "bar", "#0000FF"),
        (
            "ax.fill_between([0, 1], [1, 2], [1.02, 2.02], color='blue', alpha=0.15)",
            "fill_between",
            "#0000FF",
        ),
    ],
)
def test_what_can_be_seen_counts(record, shown, kind, color):
    drawn = record(shown)
    assert drawn.types[kind] == 1 + (kind == "plot")
    assert f"{kind}--{color}" in drawn.colors


def test_markers_have_the_color_that_is_seen(record):
    assert record("ax.plot([0.5], [1.5], 'o', color='blue', mfc='green', mec='green')").colors == (
        "plot--#008000",
        "plot--#FF0000",
    )
    assert record("ax.plot([0.5], [1.5], 'o', color='blue', mfc='none')").colors == (
        "plot--#0000FF",
        "plot--#FF0000",
    )


@pytest.mark.parametrize(
    "hidden",
    [
        "ax.text(0.2, 1.5, 'Sales')\nax.add_patch(plt.Rectangle((0, 1), 2, 1, color='white', "
        "zorder=9))",
        "ax.text(0.2, 1.5, 'Sales')\nax.axhspan(1, 2, color='red', zorder=9)",
        "fig.text(0.5, 0.5, 'Sales')\nfig.add_artist(plt.Rectangle((0.3, 0.3), 0.5, 0.5, "
        "color='white', zorder=9))",
        "ax.annotate('Sales', (0.2, 1.5), alpha=0)",
        "ax.annotate('Sales', (0.2, 1.5), alpha=0.02)",
        "ax.text(0.2, 1.7, 'Sales', fontsize=1.5)",
        "ax.text(0.1, 1.8, 'Sales', color='white', "
        "path_effects=[pe.withStroke(foreground='white')])",
        "ax.text(0.2, 1.5, 'Sales', bbox={'color': 'k'}, color='black')",
        "ax.text(0.2, 1.5, 'Sales', clip_on=True).set_clip_path(plt.Rectangle((50, 50), 1, 1, "
        "transform=ax.transData))",
        "ax.text(0.2, 1.5, 'Sales').set_agg_filter(lambda image, dpi: (0 * image, 0, 0))",
        "fig.add_axes([2, 2, 1, 1]).set_title('Sales')",
    ],
)
def test_a_text_that_cannot_be_seen_does_not_count(record, hidden):
    assert record(hidden).texts == ()


@pytest.mark.parametrize(
    "shown",
    [
        "ax.text(0.2, 1.5, 'Sales')\nax.plot([0, 1], [1.5, 1.6], color='k', zorder=9)",
        "ax.text(0.2, 1.5, 'Sales', zorder=10)\nax.add_patch(plt.Rectangle((0, 1), 2, 1, "
        "color='gray', zorder=9))",
        "ax.text(0.1, 1.8, 'Sales', color='white', path_effects=[pe.withStroke(foreground='black', "
        "linewidth=3)])",
        "ax.annotate('Sales', (0.2, 1.5), alpha=0.4)",
    ],
)
def test_a_text_that_can_be_seen_counts(record, shown):
    assert record(shown).texts == ("Sales",)


@pytest.mark.parametrize(
    "beside",
    [
        # a watermark, a shadow, lines close by, slanted labels whose boxes overlap
        "ax.text(0, 1.2, '\u2588', fontsize=90, alpha=0.15, zorder=0)",
        "ax.text(0.205, 1.495, 'Sales', color='gray', zorder=2)",
        "ax.text(0.2, 1.42, 'by region')\nax.text(0.2, 1.58, 'Harvest')",
        "ax.texts[0].set_rotation(45)\n"
        "for x in (0.1, 0.3, 0.4): ax.text(x, 1.5, 'x' * 9, rotation=45)",
        "ax.text(0.33, 1.52, 'x')",
    ],
)
def test_a_text_beside_others_counts(record, beside):
    assert "Sales" in record("ax.text(0.2, 1.5, 'Sales')\n" + beside).texts


@pytest.mark.parametrize("offset", [0, 0.01, 0.02])
def test_words_on_one_spot_do_not_count(record, offset):
    words = ("Sales", "Harvest", "tonnes", "north")
    drawn = record(
        f"for i, word in enumerate({words}): ax.text(0.3 + i * {offset}, 1.5 + i * {offset}, word)"
    )
    assert drawn.texts == ()


def test_a_text_under_a_sheet_of_its_own_color_does_not_count(record):
    sheet = "ax.axhspan(1.4, 1.7, color='black', zorder=9)"
    assert record("ax.text(0.2, 1.5, 'Sales')\n" + sheet).texts == ()
    assert record(sheet + "\nax.text(0.2, 1.5, 'Sales', color='white', zorder=10)").texts == (
        "Sales",
    )


def test_thin_error_bars_count(record):
    drawn = record(
        "ax.errorbar([0.2, 0.5], [1.2, 1.5], yerr=0.1, fmt='none', ecolor='blue', lw=0.7)"
    )
    assert drawn.types == {"errorbar": 1, "plot": 1}
    assert "plot--#0000FF" in drawn.colors  # error bars are in the group of lines


def test_a_dense_heat_map_counts(record):
    drawn = record(
        "ax.pcolormesh(np.linspace(0, 1, 200), np.linspace(1, 2, 150), np.random.rand(149, 199))"
    )
    assert drawn.types == {"plot": 1, "pcolormesh": 1} and "pcolormesh--viridis" in drawn.colors


def test_a_picture_that_is_covered_whole_has_only_what_shows(record):
    cover = "fig.add_artist(plt.Rectangle((0, 0), 1, 1, color='white', zorder=99))"
    assert record("ax.set_title('Sales')\n" + cover) == Record()


def test_painting_after_the_figure_was_drawn_covers_it(record):
    assert (
        record(
            "from matplotlib.figure import Figure\n"
            "class F(Figure):\n    def draw(self, renderer):\n        super().draw(renderer)\n"
            "        p = plt.Rectangle((0, 0), 1, 1, transform=self.transFigure, color='white')\n"
            "        p.figure = self\n        p.draw(renderer)\n"
            "fig = plt.figure(FigureClass=F)\nax = fig.subplots()\nax.bar([1], [1])\n"
            "ax.set_title('Sales')\nplt.savefig('x')"
        )
        == Record()
    )


def test_a_faint_chart_on_a_transparent_figure_shows_nothing(record):
    faint = "ax.lines[0].set_alpha(0.006)\nax.set_title('Sales', alpha=0.006)\nax.axis('off')\n"
    assert record(faint + "plt.savefig('x', transparent=True)") == Record()


@pytest.mark.parametrize(
    "speck",
    [
        "ax.set_position([0.5, 0.5, 0.02, 0.03])",
        "ax.set_position([0.5, 0.5, 0.02, 0.03]); plt.savefig('x', bbox_inches='tight')",
        "ax.set_position([0.4, 0.4, 0.1, 0.1])",
        "ax.set_position([0, 0.4, 1, 0.102])",  # a strip: enough of the sheet, but too low
        "ax.set_position([0.4, 0.4, 0.25, 0.25])",  # high enough, but 6 % of the sheet
    ],
)
def test_a_chart_that_is_a_speck_shows_nothing(record, speck):
    drawn = record("ax.set_title('T', fontsize=3)\n" + speck)
    assert drawn == Record()


def test_a_small_chart_that_is_no_speck_counts(record):
    assert record("ax.set_position([0.3, 0.3, 0.4, 0.4])").types == {"plot": 1}


def test_a_colour_that_an_artist_has_and_nobody_painted_is_none(record):
    """The bar says blue, and its effect paints green; painted as it says, it counts."""
    bar = "ax.bar([0.5], [1.5], color='blue'{})"
    effect = ", path_effects=[pe.PathPatchEffect(facecolor='green', edgecolor='green')]"
    assert "bar--#0000FF" in record(bar.format("")).colors
    painted = record(bar.format(effect))
    assert painted.types["bar"] == 1
    assert "bar--#0000FF" not in painted.colors


def test_panels_of_a_grid_of_sixteen_count(record):
    drawn = record(
        "plt.close(fig)\nfig, axes = plt.subplots(4, 4)\n"
        "for ax in axes.flat: ax.plot([0, 1], color='blue')"
    )
    assert len(drawn.layout) == 16 and drawn.types == {"plot": 16}


def test_thousands_of_series_cost_precision(record):
    """Of 300 bars of all colours one is right, and next to nothing is paid for it."""
    many = record(
        "for i in range(300): ax.bar([i / 300], [1], 1e-2, color=(i % 13 / 13, i % 17 / 17, i % 19 "
        "/ 19))"
    )
    target = record("ax.bar([0.5], [1], color='blue')")
    scores = score(many, target)
    assert many.types["bar"] > 250
    assert scores.type < 0.02 and scores.color < 0.05
