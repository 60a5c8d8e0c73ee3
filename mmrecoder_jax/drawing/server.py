"""A model behind an OpenAI-compatible server as an author: any VLM in our environment.

A conversation is one of messages:

    user        the chart, its instruction, and the form of an answer
    assistant   its answer, as it came
    user        the render of its code, or the error          (`feedback` of the configuration)
    assistant   ...

Its turns have texts, renders and scores like those of a policy, but no token ids.
"""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from mmrecoder_jax.data.sources import Chart, RandomAccess, png_bytes
from mmrecoder_jax.drawing.authors import Answered, NotShown, Told, check_samples
from mmrecoder_jax.env.chart_env import feedback_images, feedback_text
from mmrecoder_jax.env.chartmimic import score
from mmrecoder_jax.env.execution import Execution
from mmrecoder_jax.env.response import extract_code, has_format
from mmrecoder_jax.images import BadImage, decode
from mmrecoder_jax.rl.judge.base import Judge, Verdict
from mmrecoder_jax.rl.judge.http import ChatClient, Reply, Server, picture
from mmrecoder_jax.rl.rollout import Environment, refused_trajectory
from mmrecoder_jax.rl.trajectory import Trajectory, Turn
from mmrecoder_jax.rl.web import NoAnswer, ServerDown

KEY_VARIABLE = "MMRECODER_SERVER_KEY"  # environment variable that holds the server's key
# What a model is told that was not trained to answer in our form.
FORM = (
    "Answer with one whole Python script in one ```python block. It is run as it is, without files "
    "or network."
)
_MOST_PIXELS = 1_500_000  # of a picture in a message; larger ones are shrunk
_MOST_FAILURES = 8  # conversations in a row without an answer: the server is down


class ServerAuthor:
    """A model behind a server. A context manager: leaving it ends what is under way.

    Args:
      feedback: `config.feedback`: the kind of image, and the texts of a render and of an error.
      score_mode: ChartMimic rules that turns are scored by.
      judge: judges every render; its verdicts are in the turns.

    Raises:
      ConfigError: an address that is none, or a key that cannot be sent.
    """

    def __init__(
        self,
        server: Server,
        env: Environment,
        feedback: Mapping[str, str],
        score_mode: str,
        judge: Judge | None = None,
    ):
        self.name = server.model
        self._server, self._env, self._feedback = server, env, feedback
        self._score_mode, self._judge = score_mode, judge
        remedy = f"check --server, --model and the key in {server.key_variable}"
        self._client = ChatClient(server, section="server", remedy=remedy)

    def __enter__(self) -> "ServerAuthor":
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    def answer(
        self,
        charts: RandomAccess[Chart],
        *,
        turns: int,
        samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Answered]:
        """See `authors.Author`; conversations come as they end. Who stops early closes the author.

        Raises:
          ServerDown: the server refuses, or conversations ended without an answer; all others have
            been given by then, but for those that were given up.
        """
        check_samples(samples, temperature)
        numbers = range(len(charts)) if numbers is None else numbers
        asked = itertools.product(numbers, range(samples))
        failures: list[str] = []
        in_a_row = 0
        under_way: dict[Future[_Talk], tuple[int, int]] = {}
        threads = ThreadPoolExecutor(self._server.in_flight, thread_name_prefix="author")
        try:
            while True:
                for number, sample in itertools.islice(
                    asked, 2 * self._server.in_flight - len(under_way)
                ):
                    talk = threads.submit(
                        self._talk, charts[number], number, sample, turns, temperature, seed
                    )
                    under_way[talk] = number, sample
                if not under_way:
                    break
                done, _ = concurrent.futures.wait(
                    under_way, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for talk in done:
                    number, sample = under_way.pop(talk)
                    try:
                        trajectory = self._judged(talk.result())
                    except NoAnswer as problem:
                        failures.append(f"chart {charts[number].id}: {problem}")
                        in_a_row += 1
                        if problem.fatal or in_a_row >= _MOST_FAILURES:
                            raise ServerDown(f"{self.name} does not answer: {problem}") from None
                        continue
                    in_a_row = 0
                    yield number, sample, trajectory
        except BaseException:
            self._client.close()  # whoever waits for an answer waits no longer
            raise
        finally:
            threads.shutdown(cancel_futures=True)
        if failures:
            raise ServerDown(
                f"{len(failures)} conversations with {self.name} ended without an answer, the "
                f"first about {failures[0]}; the same command asks for them again"
            )

    def _talk(
        self, chart: Chart, number: int, sample: int, turns: int, temperature: float, seed: int
    ) -> "_Talk":
        """One conversation, in a thread of its own."""
        try:
            messages = [_asked(chart)]
        except BadImage as problem:
            return _Talk(refused_trajectory(chart, number, str(problem), turns), [])
        written: list[Turn] = []
        asked: list[Future[Verdict] | None] = []
        for turn in range(turns):
            own_seed = (seed * 1_000_003 + number * 1009 + sample * 31 + turn) % 2**31
            written.append(self._turn(chart, messages, temperature, own_seed))
            image = written[-1].execution.image
            verdict = None
            if self._judge is not None and image is not None:
                verdict = self._judge.submit(chart.image, image)
            asked.append(verdict)
            if turn + 1 < turns:
                messages += self._since(written[-1], chart)
        return _Talk(Trajectory(chart, number, (), tuple(written)), asked)

    def next(
        self,
        chart: Chart,
        before: Sequence[Turn],
        *,
        temperature: float = 0.0,
        seed: int = 0,
        told: Told | None = None,
    ) -> Turn:
        """See `authors.Author`.

        Raises:
          ServerDown: the server does not answer.
        """
        try:
            messages = [_asked(chart)]
        except BadImage as problem:
            raise NotShown(str(problem)) from problem
        for turn in before:
            messages += self._since(turn, chart)
        try:
            return self._turn(chart, messages, temperature, seed, told)
        except NoAnswer as problem:
            raise ServerDown(f"{self.name} does not answer: {problem}") from problem

    def _turn(
        self,
        chart: Chart,
        messages: Sequence[dict[str, Any]],
        temperature: float,
        seed: int,
        told: Told | None = None,
    ) -> Turn:
        """What the server answers, executed and scored."""
        reply = self._client.reply(messages, temperature, seed if temperature else None, told)
        execution = self._env.submit(extract_code(reply.text)).result()
        return self._scored(chart, reply, execution)

    def _since(self, turn: Turn, chart: Chart) -> list[dict[str, Any]]:
        """The messages that a turn adds: its text, and what came of it."""
        return [message("assistant", turn.text), self._told(turn.execution, chart)]

    def _told(self, execution: Execution, chart: Chart) -> dict[str, Any]:
        """The message that follows a turn."""
        images = feedback_images(execution, chart.image, self._feedback["image"])
        shown = [picture(_shrunk(Image.fromarray(image))) for image in images]
        text = feedback_text(execution, self._feedback)
        return message("user", [*shown, {"type": "text", "text": text}])

    def _scored(self, chart: Chart, reply: Reply, execution: Execution) -> Turn:
        nothing = np.zeros(0, np.float32)
        record = execution.record if execution.ok else None
        return Turn(
            ids=nothing.astype(np.int32),
            logps=nothing,
            finished=not reply.cut,
            text=reply.text,
            execution=execution,
            scores=score(record, chart.record, self._score_mode),
            format=float(has_format(reply.text)),
        )

    def _judged(self, talk: "_Talk") -> Trajectory:
        """A conversation's trajectory with the judge's verdicts; waits for them."""
        if self._judge is None or not any(talk.asked):
            return talk.trajectory
        self._judge.finish()
        turns = tuple(
            turn if verdict is None else dataclasses.replace(turn, verdict=verdict.result())
            for turn, verdict in zip(talk.trajectory.turns, talk.asked, strict=True)
        )
        return dataclasses.replace(talk.trajectory, turns=turns)


@dataclasses.dataclass(frozen=True)
class _Talk:
    """A conversation that has ended, and what the judge was asked about its turns."""

    trajectory: Trajectory
    asked: list[Future[Verdict] | None]


def _asked(chart: Chart) -> dict[str, Any]:
    """The first message; raises BadImage for a chart that is none."""
    shown = [picture(_shrunk(decode(image))) for image in chart.images]
    return message("user", [*shown, {"type": "text", "text": f"{chart.instruction}\n{FORM}"}])


def message(role: str, content: str | list[dict[str, Any]]) -> dict[str, Any]:
    """A message of a conversation."""
    return {"role": role, "content": content}


def _shrunk(image: Image.Image) -> bytes:
    """A picture as PNG, in a size that a message may have."""
    pixels = image.width * image.height
    if pixels > _MOST_PIXELS:
        ratio = (_MOST_PIXELS / pixels) ** 0.5
        size = max(1, int(image.width * ratio)), max(1, int(image.height * ratio))
        image = image.resize(size, Image.Resampling.BOX)
    return png_bytes(image)
