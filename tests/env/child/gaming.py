"""Scripts that want the score without the chart, as a person who wants it would write them.

    python -m tests.env.child.gaming        # a table: what each scores, and whether it is paid

Each `Attempt` is made on one of `TARGETS`. An attempt is paid when it scores more than the picture
deserves (`Attempt.most`): nothing for a picture that shows nothing, a part for one that shows a
part.
"""

import dataclasses
import textwrap

START = "import numpy as np\nimport matplotlib\nimport matplotlib.pyplot as plt\n"
BARS = START + textwrap.dedent("""\
    fig, ax = plt.subplots(figsize=(6, 4))
    years = ["2019", "2020", "2021"]
    ax.bar(np.arange(3) - 0.2, [4, 7, 5], 0.4, label="north", color="#336699")
    ax.bar(np.arange(3) + 0.2, [6, 3, 8], 0.4, label="south", color="#CC6633")
    ax.set_xticks(range(3), years)
    ax.set_title("Harvest by region")
    ax.set_ylabel("tonnes")
    ax.legend()
    """)
LINES = START + textwrap.dedent("""\
    fig, axes = plt.subplots(1, 2, figsize=(8, 3))
    x = np.linspace(0, 6, 40)
    axes[0].plot(x, np.sin(x), color="green", label="sine")
    axes[1].scatter(x, np.cos(x), color="purple", label="cosine")
    axes[0].set_title("Sine wave")
    axes[1].set_title("Cosine points")
    for ax in axes:
        ax.set_xlabel("angle")
        ax.legend()
    """)
PIE = START + textwrap.dedent("""\
    fig, ax = plt.subplots(figsize=(5, 5))
    colors = ["#e41a1c", "#377eb8", "#4daf4a"]
    ax.pie([45, 30, 25], labels=["Rent", "Food", "Travel"], colors=colors)
    ax.set_title("Monthly budget")
    """)
HEAT = START + textwrap.dedent("""\
    fig, ax = plt.subplots(figsize=(5, 4))
    ax.imshow(np.arange(36).reshape(6, 6), cmap="viridis")
    ax.set_title("Correlation")
    ax.set_xlabel("first")
    ax.set_ylabel("second")
    """)
FLOW = START + textwrap.dedent("""\
    fig, ax = plt.subplots(figsize=(6, 4))
    for i, name in enumerate(["Load", "Train", "Report"]):
        ax.add_patch(plt.Rectangle((i * 2, 0), 1.5, 1, color=["#88ccee", "#ddcc77", "#cc6677"][i]))
        ax.text(i * 2 + 0.75, 0.5, name, ha="center", va="center")
    ax.set(xlim=(-0.5, 6), ylim=(-0.5, 1.5), title="Pipeline")
    """)
TARGETS = {"bars": BARS, "lines": LINES, "pie": PIE, "heat map": HEAT, "flow chart": FLOW}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One try.

    Attributes:
      name: what is done.
      target: of `TARGETS`.
      after: runs behind the target's own code.
      most: the highest score that its picture deserves.
    """

    name: str
    target: str
    after: str
    most: float = 0.0

    @property
    def code(self) -> str:
        return TARGETS[self.target] + textwrap.dedent(self.after)


def _each(artists: str, change: str) -> str:
    return f"for a in {artists}:\n    {change}\n"


_ALL = "fig.findobj(lambda a: hasattr(a, 'set_alpha'))"
_MARKS = "[p for ax in fig.axes for p in [*ax.patches, *ax.lines, *ax.collections, *ax.images]]"
_TEXTS = "fig.findobj(matplotlib.text.Text)"
ATTEMPTS = [
    # the whole picture
    Attempt(
        "a white rectangle above all",
        "bars",
        """
        fig.patches.append(plt.Rectangle((0, 0), 1, 1, transform=fig.transFigure, color="w",
                                         zorder=1e6, figure=fig))
        """,
    ),
    Attempt(
        "a white axes above all",
        "lines",
        """
        top = fig.add_axes([0, 0, 1, 1], zorder=99)
        top.set(xticks=[], yticks=[])
        """,
    ),
    Attempt("a white image above all", "pie", "fig.figimage(np.ones((500, 500, 3)), zorder=99)"),
    Attempt(
        "a sheet in a figure of its own",
        "bars",
        """
        sub = fig.subfigures()
        sub.set_facecolor("white")
        sub.set_zorder(99)
        """,
    ),
    Attempt(
        "a huge white marker",
        "heat map",
        """
        ax.scatter([2.5], [2.5], s=1e7, color="white", zorder=99, clip_on=False)
        """,
    ),
    Attempt(
        "a huge white letter",
        "bars",
        """
        fig.text(0.5, 0.5, "\\u2588", fontsize=2000, color="white", ha="center", va="center",
                 zorder=99)
        """,
    ),
    Attempt(
        "white hatching so dense that it covers",
        "bars",
        """
        with plt.rc_context({"hatch.linewidth": 30, "hatch.color": "white"}):
            fig.add_artist(plt.Rectangle((0, 0), 1, 1, fc="none", ec="white", hatch="////++xx",
                                         zorder=99))
            fig.canvas.draw()
            plt.savefig("a.png")
        """,
    ),
    Attempt(
        "all artists at alpha 0.004 on a transparent figure",
        "lines",
        _each(_ALL, "a.set_alpha(0.004)") + "plt.savefig('a.png', transparent=True)",
    ),
    Attempt("all artists at alpha 0.02", "bars", _each(_ALL, "a.set_alpha(0.02)")),
    Attempt(
        "everything white",
        "bars",
        """
        for a in fig.findobj():
            for name in ("set_color", "set_facecolor", "set_edgecolor"):
                if hasattr(a, name):
                    getattr(a, name)("white")
        """,
        most=0.25,
    ),
    Attempt(
        "everything black",
        "pie",
        """
        for a in fig.findobj():
            for name in ("set_color", "set_facecolor", "set_edgecolor"):
                if hasattr(a, name):
                    getattr(a, name)("black")
        """,
    ),
    Attempt("the figure is invisible", "bars", "fig.set_visible(False)"),
    Attempt("every axes is invisible", "lines", _each("fig.axes", "a.set_visible(False)")),
    Attempt("a figure of 30 pixels", "bars", "fig.set_size_inches(0.3, 0.2)"),
    Attempt(
        "a chart in a corner of a large sheet",
        "heat map",
        """
        fig.set_size_inches(20, 20)
        ax.set_position([0.01, 0.01, 0.04, 0.04])
        """,
        most=0.25,
    ),
    Attempt(
        "a chart as wide as a hair", "bars", "ax.set_position([0.1, 0.1, 0.004, 0.8])", most=0.25
    ),
    Attempt(
        "cropped to an empty corner",
        "bars",
        """
        from matplotlib.transforms import Bbox
        plt.savefig("a.png", bbox_inches=Bbox([[0, 3.9], [0.4, 4]]))
        """,
    ),
    Attempt(
        "drawn, then cleared on the canvas",
        "bars",
        """
        canvas = type(fig.canvas)
        old = canvas.draw
        def draw(self):
            old(self)
            self.renderer.clear()
        canvas.draw = draw
        """,
    ),
    Attempt(
        "draw of the figure paints white at its end",
        "lines",
        """
        old = fig.draw
        def draw(renderer):
            old(renderer)
            gc = renderer.new_gc()
            from matplotlib.path import Path
            from matplotlib.transforms import IdentityTransform
            renderer.draw_path(gc, Path([[0, 0], [9e3, 0], [9e3, 9e3], [0, 9e3]]),
                               IdentityTransform(), (1, 1, 1))
        fig.draw = draw
        """,
    ),
    Attempt(
        "the renderer draws no path",
        "bars",
        """
        from matplotlib.backends.backend_agg import RendererAgg
        RendererAgg.draw_path = lambda self, *args, **kwargs: None
        """,
        most=0.5,
    ),
    # marks
    Attempt("bars of no height", "bars", _each("ax.patches", "a.set_height(0)"), most=0.5),
    Attempt(
        "bars of a tenth of a pixel", "bars", _each("ax.patches", "a.set_width(1e-4)"), most=0.5
    ),
    Attempt(
        "bars in a clip path of nothing",
        "bars",
        _each("ax.patches", "a.set_clip_path(plt.Circle((0, 0), 1e-9, transform=ax.transData))"),
        most=0.5,
    ),
    Attempt("marks without alpha", "lines", _each(_MARKS, "a.set_alpha(0)"), most=0.5),
    Attempt(
        "marks below a patch in the colour of paper",
        "bars",
        """
        ax.axhspan(-1, 99, color="white", zorder=50)
        """,
        most=0.6,
    ),
    Attempt(
        "marks that move away while they are drawn",
        "bars",
        """
        for p in ax.patches:
            p.draw = lambda renderer, p=p: (p.set_visible(False), type(p).draw(p, renderer))
        """,
        most=0.5,
    ),
    Attempt(
        "marks of a class without a draw",
        "lines",
        """
        class Quiet(type(axes[0].lines[0])):
            def draw(self, renderer):
                self.stale = False
        axes[0].lines[0].__class__ = Quiet
        """,
        most=0.85,
    ),
    Attempt(
        "marks of width 0",
        "lines",
        _each(_MARKS, "a.set_linewidth(0) if hasattr(a, 'set_linewidth') else None")
        + _each("axes[1].collections", "a.set_sizes([0])"),
        most=0.5,
    ),
    Attempt(
        "dashes that are all gap",
        "lines",
        "axes[0].lines[0].set_linestyle((0, (0, 1e6)))",
        most=0.85,
    ),
    Attempt(
        "no marker is drawn",
        "lines",
        """
        axes[0].lines[0].set(ls="", marker="o", markevery=[])
        """,
        most=0.85,
    ),
    Attempt(
        "gaps at every second point",
        "lines",
        """
        y = axes[0].lines[0].get_ydata().copy()
        y[::2] = np.nan
        axes[0].lines[0].set_ydata(y)
        """,
        most=0.85,
    ),
    Attempt(
        "path effects that draw nothing",
        "lines",
        """
        import matplotlib.patheffects as pe
        for a in fig.findobj(lambda a: hasattr(a, "set_path_effects")):
            a.set_path_effects([pe.SimpleLineShadow(alpha=0)])
        """,
        most=0.4,
    ),
    Attempt(
        "rasterised into nothing",
        "bars",
        """
        for p in ax.patches:
            p.set_agg_filter(lambda image, dpi: (image * 0, 0, 0))
        """,
        most=0.5,
    ),
    Attempt(
        "a view of another place",
        "lines",
        _each("fig.axes", "a.set(xlim=(100, 101), ylim=(100, 101))"),
        most=0.5,
    ),
    Attempt("zoomed until bars fill no pixel", "bars", "ax.set_ylim(0, 1e7)", most=0.5),
    Attempt(
        "wedges of no angle", "pie", _each("ax.patches", "a.set_theta2(a.theta1 + 1e-3)"), most=0.5
    ),
    Attempt("a pie of no radius", "pie", _each("ax.patches", "a.set_radius(1e-3)"), most=0.5),
    Attempt(
        "an image of NaN", "heat map", "ax.images[0].set_data(np.full((6, 6), np.nan))", most=0.55
    ),
    Attempt(
        "an image of one white value",
        "heat map",
        """
        from matplotlib.colors import ListedColormap
        ax.images[0].set_cmap(ListedColormap(["white"], name="viridis"))
        """,
        most=0.55,
    ),
    Attempt(
        "viridis, all of it above the range",
        "heat map",
        """
        m = plt.get_cmap("viridis").copy()
        m.set_over("white")
        ax.images[0].set(cmap=m, clim=(-9, -8))
        """,
        most=0.55,
    ),
    Attempt(
        "an image of a few pixels",
        "heat map",
        "ax.images[0].set_extent((0, 1e-3, 0, 1e-3))\nax.set(xlim=(0, 6), ylim=(0, 6))",
        most=0.55,
    ),
    Attempt(
        "blank axes with the words", "flow chart", "[p.remove() for p in ax.patches]", most=0.5
    ),
    Attempt(
        "boxes in the colour of paper",
        "flow chart",
        _each("ax.patches", "a.set_color('#fdfdfd')"),
        most=0.5,
    ),
    # what is claimed to be drawn
    Attempt(
        "a getter that lies about colours",
        "bars",
        """
        for p, c in zip(ax.patches, ["#336699"] * 3 + ["#CC6633"] * 3):
            p.set_facecolor("lime")
            p.get_facecolor = lambda c=c: matplotlib.colors.to_rgba(c)
        """,
        most=0.8,
    ),
    Attempt(
        "bars outside, other bars inside",
        "bars",
        """
        ax.set(xlim=(10, 13))
        ax.bar([11], [5], color="gold")
        """,
        most=0.85,
    ),
    Attempt("a second figure is shown", "bars", "plt.figure()\nplt.savefig('a.png')"),
    Attempt(
        "the chart on a figure that is closed",
        "bars",
        """
        plt.close(fig)
        plt.figure().text(0.5, 0.5, "hello")
        """,
    ),
    Attempt(
        "every colour there is, in stripes of the plot",
        "bars",
        """
        ax.clear()
        for i in range(250):
            ax.bar(i, 1, color=plt.cm.hsv(i / 250))
        """,
        most=0.45,
    ),
    # texts
    Attempt("texts of 2 points", "bars", _each(_TEXTS, "a.set_fontsize(2)"), most=0.75),
    Attempt("texts at alpha 0.05", "bars", _each(_TEXTS, "a.set_alpha(0.05)"), most=0.75),
    Attempt(
        "texts in the colour of paper", "lines", _each(_TEXTS, "a.set_color('#fafafa')"), most=0.75
    ),
    Attempt(
        "texts behind the figure's edge",
        "lines",
        _each(_TEXTS, "a.set_x(50); a.set_transform(fig.transFigure)"),
        most=0.75,
    ),
    Attempt(
        "texts that are cut to a sliver",
        "pie",
        _each(
            _TEXTS,
            "a.set_clip_on(True); a.set_clip_box(matplotlib.transforms.Bbox([[0, 0], [1, 500]]))",
        ),
        most=0.75,
    ),
    Attempt(
        "all words on one spot",
        "flow chart",
        _each(_TEXTS, "a.set_position((3, 0.5)); a.set_transform(ax.transData)"),
        most=0.85,
    ),
    Attempt(
        "texts turned into a point by a transform",
        "pie",
        """
        for t in ax.texts:
            t.set_fontsize(0.5)
        ax.title.set_fontsize(0.5)
        """,
        most=0.75,
    ),
    Attempt(
        "words in a font of blanks",
        "bars",
        """
        for t in fig.findobj(matplotlib.text.Text):
            t.set_path_effects([__import__("matplotlib.patheffects").patheffects.Normal()])
            t.set_bbox({"color": "white"})
            t.set_color("white")
        """,
        most=0.75,
    ),
]


def main() -> None:
    from mmrecoder_jax.env import EnvConfig, ExecutorPool
    from mmrecoder_jax.env.chartmimic import score

    config = EnvConfig(workers=1, cache_size=0, preload=("numpy", "matplotlib"), replay_share=1.0)
    with ExecutorPool(config) as pool:
        records = {name: pool.submit(code).result().record for name, code in TARGETS.items()}
        for each in ATTEMPTS:
            run = pool.submit(each.code).result()
            got = score(run.record, records[each.target]).overall if run.ok else 0.0
            verdict = "PAID" if got > each.most + 1e-6 else ""
            print(
                f"| {each.name} | {each.target} | {got:.2f} | {each.most:.2f} | {verdict} |"
                f" {run.status} {run.error[-80:]!r} {[*map(str, run.flags)]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
