"""A page on which charts are redrawn, turn by turn; needs the extra `ui` (gradio).

    pip install 'mmrecoder_jax[ui]'
    python -m mmrecoder_jax.demo
    python -m mmrecoder_jax.demo --checkpoint=runs/tiny/stage2 --port=7861
    python -m mmrecoder_jax.demo --server=http://localhost:8000/v1 --model=NAME

It is served on the loopback interface, unless `--host` says otherwise. Visitors drop or paste a
chart, see each turn's code, render and difference, may edit the code and run it in the sandbox, and
ask for another turn. What they and the author write is shown as text, never as a part of the page.
"""

import argparse
import secrets
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from mmrecoder_jax.command import Parser, ending_in_one_line, quiet
from mmrecoder_jax.config import ConfigError, check_port
from mmrecoder_jax.drawing.authors import NotShown
from mmrecoder_jax.drawing.flags import add_author, author_of
from mmrecoder_jax.drawing.open import author_config, keep_programs, open_author
from mmrecoder_jax.drawing.studio import NotNow, Studio, Visit
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.env.response import begun_code, extract_thought
from mmrecoder_jax.images import BadImage
from mmrecoder_jax.rl.web import ServerDown
from mmrecoder_jax.stage import env_config

_FOR_VISITORS = (BadImage, NotShown, NotNow, ServerDown)  # their messages are for visitors
_SECONDS_KEPT = 3600  # of what a visitor has sent and seen
_LARGEST_FILE = "64mb"
_TOKENS_AT_ONCE = 8  # of a response that is shown while it is written
_NO_CHART = "Drop or paste a chart first, and press Draw."


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves the page until Ctrl-C; returns the exit status."""
    args = _parser().parse_args(arguments)
    quiet()
    with ending_in_one_line(args.traceback):
        _serve(args)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m mmrecoder_jax.demo",
        description="A page on which charts are redrawn, turn by turn.",
    )
    what = "interface to serve on; 0.0.0.0 lets other machines in (127.0.0.1)"
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=what)
    parser.add_argument(
        "--port", type=int, default=7860, metavar="N", help="0: any free one (7860)"
    )
    add_author(parser)
    return parser


def _serve(args: argparse.Namespace) -> None:
    check_port(args.port)
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(
            "the page needs gradio, which the extra `ui` brings: pip install 'mmrecoder_jax[ui]'"
        ) from error
    who = author_of(args)
    config = author_config(who)
    config.env.sandbox = args.sandbox
    config.rl.decode_chunk = min(config.rl.decode_chunk, _TOKENS_AT_ONCE)
    keep_programs()
    with (
        ChartEnv(env_config(config)) as env,
        open_author(who, config=config, env=env) as author,
    ):
        page = build(Studio(author, env, config.data.instruction))
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        _, address, _ = page.launch(
            server_name=args.host,
            server_port=args.port or None,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            max_file_size=_LARGEST_FILE,
            footer_links=[],
            theme=gradio.themes.Default(**fonts),  # its own fonts come from another host
        )
        print(f"{author.name} draws at {address} (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            page.close(verbose=False)


def build(studio: Studio) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    with gr.Blocks(
        title="MM-ReCoder",
        analytics_enabled=False,
        delete_cache=(_SECONDS_KEPT // 6, _SECONDS_KEPT),
    ) as page:
        gr.Markdown("# Chart to code, turn by turn")
        visit = gr.State(None, time_to_live=_SECONDS_KEPT)
        with gr.Row():
            with gr.Column(scale=2):
                chart = gr.Image(
                    label="Chart",
                    type="filepath",
                    image_mode=None,  # the file as it came: `images` decodes it
                    sources=["upload", "clipboard"],
                    height=300,
                    elem_id="chart",
                )
                turns = gr.Slider(1, 6, value=2, step=1, label="Turns")
                heat = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature (0: greedy)")
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                choice = gr.Radio([], label="Turns so far", elem_id="steps")
            with gr.Column(scale=3):
                code = gr.Code(
                    language="python", label="Code", interactive=True, lines=12, elem_id="code"
                )
                with gr.Row():
                    run = gr.Button("Run this code", elem_id="run")
                    more = gr.Button("Another turn by the author", elem_id="more")
                note = gr.Textbox(label="What came of it", lines=2, elem_id="note")
        with gr.Row():
            still = {"interactive": False, "format": "png", "height": 300}
            render = gr.Image(label="Render", elem_id="render", **still)
            difference = gr.Image(
                label="Difference from the chart (white: right)", elem_id="difference", **still
            )
        seen = [visit, choice, code, render, difference, note]
        view = _View(studio, gr)
        draw.click(view.draw, [chart, turns, heat], seen, concurrency_limit=None)
        run.click(view.run, [visit, code], seen, concurrency_limit=None)
        more.click(view.more, [visit, code, heat], seen, concurrency_limit=None)
        choice.input(view.pick, [visit, choice], seen[2:], concurrency_limit=None)
    return page


class _View:
    """What the buttons do; each gives the values of visit, choice, code, render, difference and
    note.
    """

    def __init__(self, studio: Studio, gr: Any):
        self._studio, self._gr = studio, gr

    def draw(self, picture: str | None, turns: float, heat: float) -> Iterator[tuple[Any, ...]]:
        """Begins a visit and has turns written, each shown when it is there."""
        if picture is None:
            yield self._kept(_NO_CHART)
            return
        try:
            visit = self._studio.open(picture)
            for _ in range(int(turns)):
                visit = yield from self._written(visit, heat)
        except _FOR_VISITORS as problem:
            yield self._kept(str(problem))

    def run(self, visit: Visit | None, code: str | None) -> tuple[Any, ...]:
        """Runs the code that is shown, as a turn of the visitor."""
        if visit is None:
            return self._kept(_NO_CHART)
        try:
            return self._seen(self._studio.run(visit, code or ""))
        except _FOR_VISITORS as problem:
            return self._kept(str(problem))

    def more(self, visit: Visit | None, code: str | None, heat: float) -> Iterator[tuple[Any, ...]]:
        """Another turn by the author, who sees the code that is shown as the last turn."""
        if visit is None:
            yield self._kept(_NO_CHART)
            return
        try:
            written = code or ""
            if visit.steps and written.strip() != visit.steps[-1].code.strip():
                visit = self._studio.run(visit, written)
            yield from self._written(visit, heat)
        except _FOR_VISITORS as problem:
            yield self._kept(str(problem))

    def pick(self, visit: Visit | None, number: int | None) -> tuple[Any, ...]:
        """Shows an earlier turn."""
        if visit is None or number is None:
            return self._kept(_NO_CHART)[2:]
        return self._seen(visit, number=number)[2:]

    def _written(self, visit: Visit, heat: float) -> Generator[tuple[Any, ...], None, Visit]:
        """Shows the next turn while it is written; returns the visit with it."""
        note = f"turn {len(visit.steps) + 1} is being written ..."
        yield self._seen(visit, note)
        for event in self._studio.follow(visit, heat, secrets.randbelow(2**31)):
            if isinstance(event, str):
                told, same = [note, extract_thought(event)], self._gr.skip()
                yield same, same, begun_code(event), same, same, "\n".join(filter(None, told))
            else:
                visit = event
        yield self._seen(visit)
        return visit

    def _seen(self, visit: Visit, note: str = "", number: int = -1) -> tuple[Any, ...]:
        """A visit, of which one turn is shown."""
        choices = [(f"{i}. {step.line}", i - 1) for i, step in enumerate(visit.steps, 1)]
        if not visit.steps:
            return visit, self._gr.Radio(choices=[], value=None), "", None, None, note
        step = visit.steps[number]
        execution = step.turn.execution
        said = [step.line, step.thought, execution.error, note]
        return (
            visit,
            self._gr.Radio(choices=choices, value=number % len(visit.steps)),
            step.code,
            execution.image,
            step.difference,
            "\n".join(line for line in said if line),
        )

    def _kept(self, note: str) -> tuple[Any, ...]:
        """All as it is, but for the note."""
        return (*[self._gr.skip()] * 5, note)


if __name__ == "__main__":
    sys.exit(main())
