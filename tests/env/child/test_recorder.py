"""What is recorded of a script, run in a real executor.

The second half has scripts that try to be scored for what they did not draw.
"""

import pytest

from mmrecoder_jax.env.chartmimic import score
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.records import Record

START = (
    "import matplotlib.pyplot as plt\nimport numpy as np\nfig, ax = plt.subplots(figsize=(4, 3))\n"
)
CELL = (1, 1, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def pool():
    with ExecutorPool(
        EnvConfig(workers=2, preload=("numpy", "matplotlib"), wall_seconds=120)
    ) as pool:
        yield pool


@pytest.fixture(scope="module")
def record(pool):
    def record(body: str, start: str = START) -> Record:
        execution = pool.submit(start + body).result()
        assert execution.ok, execution.error
        return execution.record

    return record


# ------------------------------------------------------------------------------ what a record holds


def test_a_bar_chart(record):
    drawn = record(r"""
ax.bar(["a", "b"], [1, 2], color=["tab:blue", "#ff0000"], label="s")
ax.set_title("T\nwo")
ax.set_xlabel("$x$")
ax.legend()
""")
    assert drawn == Record(
        texts=("$x$", "T", "wo", "s"),
        layout=(CELL,),
        types={"bar": 1},
        colors=("bar--#1F77B4", "bar--#FF0000"),
    )


def test_what_is_hatched_has_the_colour_of_its_face(record):
    drawn = record(
        "ax.fill_between([0, 1], [1, 2], facecolor='red', hatch='//', edgecolor='k')\n"
        "ax.bar([2], [1], color='lime', hatch='x')"
    )
    assert drawn.colors == ("bar--#00FF00", "fill_between--#FF0000")


def test_tick_labels_are_no_texts_minor_and_three_dimensional_ones_too(record):
    assert record("ax.plot([1e9, 2e9], [1, 2]); ax.minorticks_on()").texts == ()
    assert record(
        "fig.clf(); ax = fig.add_subplot(projection='3d'); ax.plot([0, 1], [0, 1], [0, 1]); "
        "ax.set_zlabel('z')"
    ).texts == ("z",)
    assert record("ax.bar(['north', 'south'], [1, 2])").texts == ()


def test_tick_labels_of_axisartist_are_no_texts(record):
    start = """
import matplotlib.pyplot as plt
from mpl_toolkits import axisartist
ax = plt.figure().add_subplot(axes_class=axisartist.Axes)
"""
    assert record("ax.plot([1, 2])\nax.axis['left'].label.set_text('height')", start).texts == (
        "height",
    )


def test_formatters_of_dates_do_not_fail(pool):
    dates = """
import datetime
import matplotlib.dates as md
ax.plot([datetime.date(2024, 1, d) for d in (1, 2, 3)], [1, 2, 3])
"""
    concise = "ax.xaxis.set_major_formatter(md.ConciseDateFormatter(ax.xaxis.get_major_locator()))"
    execution = pool.submit(START + dates + concise).result()
    assert execution.ok, execution.error
    assert execution.record.types == {"plot": 1}


def test_a_tight_box_and_a_second_save_do_not_double_texts(record):
    saves = "fig.savefig('a.pdf')\nplt.savefig('b.png', bbox_inches='tight')"
    assert record(
        f"ax.plot([1, 2]); ax.set_title('once')\nfig.tight_layout()\nfig.canvas.draw()\n{saves}"
    ).texts == ("once",)


def test_layout_is_of_the_figure_that_is_kept_even_when_it_was_closed(record):
    drawn = record(
        "fig, axs = plt.subplots(2, 1); axs[0].plot([1, 2]); plt.savefig('a.png'); plt.close('all')"
    )
    assert drawn.layout == ((2, 1, 0, 0, 0, 0), (2, 1, 1, 1, 0, 0))
    assert drawn.types == {"plot": 1}


def test_only_the_figure_in_the_picture_counts(record):
    drawn = record("ax.bar([1], [1])\nfig, ax = plt.subplots()\nax.plot([1, 2], color='red')")
    assert drawn.types == {"plot": 1}
    assert drawn.colors == ("plot--#FF0000",)


def test_colors_are_final_for_every_artist(record):
    assert record(
        "bars = ax.bar([1, 2], [1, 2])\nbars[0].set_facecolor('red')\nbars[1].set_color('C2')"
    ).colors == (
        "bar--#2CA02C",
        "bar--#FF0000",
    )
    boxes = "boxes = ax.boxplot([[1, 2, 3]] * 3, patch_artist=True)['boxes']\n"
    boxes += "for b, c in zip(boxes, 'rgb'): b.set_facecolor(c)"
    assert record(boxes).colors == ("boxplot--#0000FF", "boxplot--#008000", "boxplot--#FF0000")


def test_an_unfilled_boxplot_has_a_color(record):
    assert record("ax.boxplot([[1, 2, 3]])").colors == ("boxplot--#000000",)


@pytest.mark.parametrize(
    ("call", "kind", "color"),
    [
        ("ax.pcolormesh(np.eye(3), cmap='hot')", "pcolormesh", "hot"),
        ("ax.hist2d([1, 2], [1, 2], cmap='jet')", "pcolormesh", "jet"),
        ("ax.hexbin([1, 2], [1, 2], gridsize=4)", "hexbin", "viridis"),
        ("ax.stackplot([1, 2], [1, 2], colors=['red'])", "fill_between", "#FF0000"),
        (
            "ax.streamplot(np.arange(4), np.arange(4), np.ones((4, 4)), np.ones((4, 4)), "
            "color='red')",
            "streamplot",
            "#FF0000",
        ),
        ("ax.imshow(np.eye(3), cmap='gray')", "imshow", "gray"),
        (
            "ax.imshow(np.eye(3), cmap=plt.matplotlib.colors.ListedColormap(['r', 'b']))",
            "imshow",
            "from_list",
        ),
        ("ax.scatter([1, 2], [1, 2], c=[1, 2], cmap='hot')", "scatter", "hot"),
        ("ax.contour(np.eye(3), colors='red')", "contour", "#FF0000"),
        ("ax.contourf(np.eye(3), cmap='hot')", "contourf", "hot"),
        ("ax.errorbar([1, 2], [1, 2], yerr=0.1, color='red')", "errorbar", "#FF0000"),
        ("ax.violinplot([[1, 2, 3]])['bodies'][0].set_facecolor('red')", "violinplot", "#FF0000"),
        ("ax.pie([1, 2], colors=['red'], labels=['a', 'b'])", "pie", "#FF0000"),
        ("ax.eventplot([1, 2], color='red')", "eventplot", "#FF0000"),
        ("ax.add_patch(plt.Circle((0.5, 0.5), 0.1, color='red'))", "circle", "#FF0000"),
        ("ax.barh([1], [1], color='red')", "barh", "#FF0000"),
        ("ax.broken_barh([(0, 1)], (0, 1), facecolors='red')", "broken_barh", "#FF0000"),
        ("ax.step([1, 2], [1, 2], color='red')", "plot", "#FF0000"),
        ("ax.axhspan(0, 1, color='red')", "axhspan", "#FF0000"),
    ],
)
def test_drawing_functions(record, call, kind, color):
    drawn = record(call)
    assert drawn.types == {kind: 1}
    assert f"{color}" in {entry.split("--")[1] for entry in drawn.colors}


def test_three_dimensional_functions_are_types_of_their_own(record):
    start = """
import matplotlib.pyplot as plt
import numpy as np
ax = plt.figure().add_subplot(projection='3d')
"""
    assert record("ax.scatter([0, 1], [0, 1], [0, 1], color='red')", start).types == {
        "scatter3d": 1
    }
    assert record("ax.scatter3D([0, 1], [0, 1], [0, 1], color='red')", start).colors == (
        "scatter3d--#FF0000",
    )
    surface = record(
        "x, y = np.meshgrid(range(9), range(9))\nax.plot_surface(x, y, x * y, cmap='hot')", start
    )
    assert (surface.types, surface.colors) == ({"plot_surface3d": 1}, ("plot_surface3d--hot",))


def test_a_colorbar_is_no_chart(record):
    drawn = record(
        "image = ax.imshow(np.eye(3)); bar = fig.colorbar(image, label='mass'); image.set_clim(0, "
        "2); bar.update_normal(image)"
    )
    assert drawn.types == {"imshow": 1}
    assert drawn.texts == ("mass",)


def test_networkx_is_hooked_when_a_script_imports_it(record):
    pytest.importorskip("networkx")
    drawn = record(
        "import networkx as nx\nnx.draw_networkx(nx.path_graph(2), node_color='red', "
        "edge_color='blue', font_color='green')"
    )
    assert drawn.types == {
        "draw_networkx_nodes": 1,
        "draw_networkx_edges": 1,
        "draw_networkx_labels": 1,
    }
    assert drawn.colors == (
        "draw_networkx_edges--#0000FF",
        "draw_networkx_labels--#008000",
        "draw_networkx_nodes--#FF0000",
    )
    arrows = record(
        "import networkx as nx\nnx.draw_networkx_edges(nx.DiGraph([(0, 1)]), {0: (0, 0), 1: (1, "
        "1)}, edge_color='blue')"
    )
    assert (arrows.types, arrows.colors) == (
        {"draw_networkx_edges": 1},
        ("draw_networkx_edges--#0000FF",),
    )


def test_an_artist_that_cannot_be_read_does_not_fail_the_script(record):
    hooked = """
bar = ax.bar([1], [1])[0]
odd = {'get_edgecolor': None, 'get_facecolor': lambda self: 7}
bar.__class__ = type('Odd', (type(bar),), odd)
"""
    assert record(hooked + "ax.plot([1, 2])").types == {"plot": 1}


def test_a_caught_exception_does_not_stop_the_log(record):
    assert record(
        "try:\n    ax.plot([1, 2], [1, 2, 3])\nexcept ValueError:\n    pass\nax.bar([1], [1])"
    ).types == {"bar": 1}


def test_records_do_not_bleed_from_one_script_into_the_next(record):
    record("ax.bar([1], [1]); ax.set_title('first')")
    assert record("ax.plot([1, 2])") == Record(
        layout=(CELL,), types={"plot": 1}, colors=("plot--#1F77B4",)
    )


# ------------------------------------------------------------- what is not drawn must not be scored

TARGET = "ax.plot([1, 2], color='red')\nax.set_title('Sales')\nax.text(0.5, 1.5, 'peak')\n"
PLAIN = "ax.plot([1, 2], color='red')\n"


@pytest.mark.parametrize(
    "hidden",
    [
        "ax.text(0.5, 1.5, 'Sales', alpha=0)",
        "ax.text(0.5, 1.5, 'Sales', color=(0, 0, 0, 0))",
        "ax.text(0.5, 1.7, 'Sales', color='white')",
        "ax.text(0.5, 1.5, 'Sales', fontsize=0.5)",
        "fig.text(3, 3, 'Sales')",
        "fig.text(-0.5, 0.5, 'Sales', rotation=90)",
        "ax.text(9, 9, 'Sales', clip_on=True)",
        "ax.text(0.5, 1.5, 'Sales').set_visible(False)",
        "ax.text(0.5, 1.5, 'Sales').remove()",
        "ax.set_xticks([0.5], ['Sales'])",
    ],
)
def test_text_that_leaves_no_pixels_is_not_recorded(record, hidden):
    assert record(PLAIN + hidden).texts == ()


def test_a_text_drawn_twice_in_one_place_counts_once(record):
    assert record("for _ in range(5): ax.text(0.5, 0.5, 'Sales')").texts == ("Sales",)


def test_a_text_repeated_elsewhere_costs_precision(record):
    target = record(TARGET)
    assert score(record(TARGET + "ax.text(0.1, 1.2, 'Sales')"), target).text == pytest.approx(0.8)


@pytest.mark.parametrize(
    "hidden",
    [
        "ax.bar([1], [1], alpha=0)",
        "ax.bar([1], [1], color='none')",
        "ax.bar([1], [1])[0].remove()",
        "ax.bar([1], [1])[0].set_visible(False)",
        "ax.bar([], [])",
        "ax.bar([500], [1]); ax.set_xlim(0, 1)",
        "plt.figure().add_subplot().bar([1], [1]); plt.figure(fig)",
        "b = fig.add_subplot(); b.bar([1], [1]); b.set_visible(False)",
        "plt.figure().add_subplot().bar([1], [1]); plt.close(); plt.figure(fig)",
    ],
)
def test_series_that_do_not_show_are_no_types_and_no_colors(record, hidden):
    drawn = record(PLAIN + hidden)
    assert drawn.types == {"plot": 1}
    assert drawn.colors == ("plot--#FF0000",)


@pytest.mark.parametrize(
    ("drawn", "types"),
    [
        ("ax.add_patch(plt.Rectangle((0, 1), 1, 1))", {"rectangle": 1}),
        ("ax.add_artist(plt.Polygon([(0, 1), (1, 1), (1, 2)]))", {"polygon": 1}),
        (
            "class Bar(plt.Rectangle): pass\nax.add_patch(Bar((0, 1), 1, 1))",  # no type of its own
            {"rectangle": 1},
        ),
        ("ax.add_patch(plt.Circle((0.5, 1.5), 0.3))", {"circle": 1}),
        (
            "from matplotlib.collections import LineCollection\n"
            "ax.add_collection(LineCollection([[(0, 2), (1, 1)]]))",
            {"linecollection": 1},
        ),
        ("ax.add_patch(plt.matplotlib.patches.Arc((0.5, 1.5), 1, 1))", {"arc": 1}),
        ("ax.table([['a', 'b']], bbox=(0, 0, 1, 1))", {"table": 1}),
        ("ax.add_artist(ax.legend(['a']))", {}),
        ("fig.add_artist(plt.Rectangle((0, 0), 0.5, 0.5))", {"rectangle": 1}),
        ("ax.bar([0], [1])", {"bar": 1}),  # its rectangles are those of the bars
    ],
)
def test_what_a_script_adds_itself_has_a_type(record, drawn, types):
    assert record(PLAIN + drawn).types == {"plot": 1} | types


def test_a_flow_chart_has_a_type(record):
    start = "from matplotlib.sankey import Sankey\n"
    types = record(start + "Sankey(ax, flows=[1, -0.5, -0.5]).finish()").types
    assert types == {"pathpatch": 1}


def test_venn_diagrams_have_a_type(record):
    pytest.importorskip("matplotlib_venn")
    types = record("from matplotlib_venn import venn2\nvenn2((3, 2, 1), ax=ax)").types
    assert types["venndiagram"] == 1


def test_blank_axes_are_no_answer_to_a_chart_without_hooked_functions(record):
    chart = record("ax.add_patch(plt.Rectangle((0, 0), 1, 0.5))\nax.set_title('T')")
    blank = record("ax.set_title('T')")
    assert score(blank, chart).type == 0.0 and score(blank, chart).color == 0.0
    assert score(chart, chart).overall == 1.0


def test_every_preload_gives_the_same_record_of_a_network():
    pytest.importorskip("networkx")
    start = "import networkx as nx\ng = nx.path_graph(3)\np = {0: (0, 0), 1: (1, 1), 2: (2, 0)}\n"
    whole = start + "nx.draw_networkx(g, p)"
    parts = (
        start + "nx.draw_networkx_nodes(g, p)\nnx.draw_networkx_edges(g, p)\n"
        "nx.draw_networkx_labels(g, p)"
    )
    found = []
    for preload in (EnvConfig.preload, ("numpy",)):
        with ExecutorPool(EnvConfig(workers=1, preload=preload, wall_seconds=120)) as pool:
            found += [pool.submit(code).result().record for code in (whole, parts)]
    assert len({str(record) for record in found}) == 1
    assert set(found[0].types) == {f"draw_networkx_{part}" for part in ("nodes", "edges", "labels")}


def test_a_colormap_under_the_name_of_another(record):
    map_of = "c = plt.matplotlib.colors.ListedColormap(['red', 'blue'], 'viridis')\n"
    assert record(map_of + "ax.imshow(np.eye(3), cmap=c)").colors == ("imshow--from_list",)
    assert record("ax.imshow(np.eye(3), cmap=plt.get_cmap('viridis', 4))").colors == (
        "imshow--viridis",
    )


def test_a_colour_that_was_not_painted(record):
    lie = "line, = ax.plot([0, 1], color='lime')\nline.get_color = lambda: 'navy'"
    assert record(lie).colors == () and record(lie).types == {"plot": 1}


def test_circles_that_are_made_but_not_drawn_do_not_count(record):
    assert record(PLAIN + "plt.Circle((0, 0), 1, color='blue')").types == {"plot": 1}


def test_duplicate_artists_cost_precision_of_the_type(record):
    more = "".join(f"ax.plot([{i}, {i + 1}], color='red')\n" for i in (2, 3, 4))
    scores = score(record(TARGET + more), record(TARGET))
    assert scores.type == pytest.approx(0.4)
    assert scores.color == 1.0


def test_axes_that_show_nothing_are_no_layout(record):
    assert record(
        "fig.clf()\nfor a in fig.subplots(1, 2): a.set_axis_off()\nfig.axes[0].plot([1, 2])"
    ).layout == ((1, 2, 0, 0, 0, 0),)
    assert record("ax.plot([1, 2])\nfig.add_subplot(2, 2, 1).set_visible(False)").layout == (CELL,)
    assert record(
        "ax.plot([1, 2])\nfig.add_subplot(2, 2, 1).set_position([0, 0, 0, 0])"
    ).layout == (CELL,)


def test_empty_framed_axes_count(record):
    """Open: an empty frame is a visible subplot, so an empty grid gets the layout part alone."""
    target = record("fig.clf()\nfor a in fig.subplots(2, 2).flat: a.plot([1, 2]); a.set_title('t')")
    scores = score(record("fig.clf()\nfig.subplots(2, 2)"), target)
    assert scores.layout == 1.0
    assert (scores.text, scores.type, scores.color) == (0, 0, 0)
