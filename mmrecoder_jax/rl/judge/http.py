"""A judge behind any server that speaks `/v1/chat/completions` (vLLM, SGLang, llama.cpp, a
vendor's).

`ChatClient` asks one question, as patiently as `rl.web.Client` does. `HttpJudge` has many questions
in flight, in threads: they wait for sockets while the accelerator decodes.
"""

import base64
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.rl.judge.answers import POINTS_QUESTION, Question, cut_off
from mmrecoder_jax.rl.judge.base import Answer, Judge, Verdict, VerdictCache
from mmrecoder_jax.rl.web import Address, BadAnswer, Client, NoAnswer


class AnswerCut(NoAnswer):
    """The answer was longer than `Server.max_tokens`."""


@dataclasses.dataclass(frozen=True)
class Server:
    """Where the judge is, and how patient to be with it.

    Attributes:
      url: the address including `/v1`, e.g. "http://localhost:8000/v1".
      model: the name the server knows the judge by.
      key_variable: environment variable that holds the key; no key is sent if it is unset or empty.
      in_flight: questions asked at the same time.
      timeout_seconds: for one attempt, from connecting to the last byte.
      retries: further attempts after the first.
      max_tokens: the longest answer.
      pause_seconds: before the first retry; it doubles each time, up to a minute.
    """

    url: str
    model: str
    key_variable: str
    in_flight: int
    timeout_seconds: float
    retries: int
    max_tokens: int
    pause_seconds: float = 1.0


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a server wrote; `cut` where the limit ended it."""

    text: str
    cut: bool


class ChatClient:
    """Asks a server, one question at a time in each thread.

    Args:
      section: of the configuration, which messages name.
      remedy: what messages say where the server refuses every question; "": the section's fields.

    Raises ConfigError for an address that is none, or a key that cannot be sent.
    """

    def __init__(
        self,
        server: Server,
        on_retry: Callable[[], None] = lambda: None,
        section: str = "judge",
        remedy: str = "",
    ):
        self.server, self._section = server, section
        address = Address(
            section,
            server.url,
            server.key_variable,
            server.timeout_seconds,
            server.retries,
            remedy or f"check {section}.url, {section}.model and the key's environment variable",
            server.pause_seconds,
        )
        self._client = Client(address, on_retry)
        self.close, self.shown = self._client.close, self._client.shown

    def ask(self, messages: Sequence[dict[str, Any]], whole: bool = False) -> str:
        """The text of the answer, at temperature 0.

        Raises:
          AnswerCut: `whole` was asked for, and the answer's limit cut it.
          NoAnswer: there is none.
        """
        reply = self.reply(messages)
        if reply.cut and whole:
            raise AnswerCut(f"longer than {self.server.max_tokens} tokens")
        return reply.text

    def reply(
        self,
        messages: Sequence[dict[str, Any]],
        temperature: float = 0,
        seed: int | None = None,
        told: Callable[[str], None] | None = None,
    ) -> Reply:
        """The answer, of which the limit may have cut the end.

        Args:
          seed: is sent where it is given; a server need not heed it.
          told: is given the text so far while it comes; the server is asked for a stream then. A
            further attempt begins anew.

        Raises:
          NoAnswer: there is none.
        """
        question = {
            "model": self.server.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": self.server.max_tokens,
        }
        if seed is not None:
            question["seed"] = seed
        begin = None
        if told is not None:
            question["stream"] = True
            begin = functools.partial(_telling, told)
        return self._client.post(
            "/chat/completions", json.dumps(question).encode(), self._read, begin
        )

    def _read(self, answer: bytes) -> Reply:
        try:
            if answer.lstrip().startswith(b"{"):
                choice = json.loads(answer)["choices"][0]
                text, refusal = _said(choice["message"]), choice["message"].get("refusal")
                is_cut = choice.get("finish_reason") == "length"
            else:
                streamed = _Streamed()
                for line in answer.splitlines():
                    streamed.add(line)
                text, refusal, is_cut = streamed.whole()
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise BadAnswer(
                f"not an answer of /v1/chat/completions: {self._client.excerpt(answer)}"
            ) from None
        if text is None and refusal:  # asked again, it would refuse again
            raise NoAnswer(self.shown(f"the {self._section} refuses: {refusal}"))
        if text is None and is_cut:  # all of it was spent on what is no text
            text = ""
        if text is None:
            raise BadAnswer(f"an answer without text: {self._client.excerpt(answer)}")
        return Reply(text, is_cut)


class _Streamed:
    """An answer that comes in events, a line `data: {...}` each; other lines say nothing."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._refusals: list[str] = []
        self._end = ""

    def add(self, line: bytes) -> bool:
        """Takes a line; returns whether the text has grown. Raises as JSON and dictionaries do."""
        name, _, data = line.strip().partition(b":")
        data = data.strip()
        if name != b"data" or not data:
            return False
        if data == b"[DONE]":
            self._end = self._end or "stop"
            return False
        choices = json.loads(data)["choices"]
        if not choices:  # counts of tokens, behind the last
            return False
        delta = choices[0].get("delta") or {}
        text, refusal = _said(delta), delta.get("refusal")
        self._texts += [text] if text else []
        self._refusals += [refusal] if refusal else []
        self._end = choices[0].get("finish_reason") or self._end
        return bool(text)

    @property
    def text(self) -> str:
        """What has come so far."""
        return "".join(self._texts)

    def whole(self) -> tuple[str | None, str, bool]:
        """(text or None, refusal, whether the limit cut it); ValueError before its end."""
        if not self._end:
            raise ValueError("the stream has no end")
        return self.text or None, "".join(self._refusals), self._end == "length"


def _telling(told: Callable[[str], None]) -> Callable[[bytes], None]:
    """Takes the lines of one attempt, and tells the text that they make."""
    streamed = _Streamed()

    def line(found: bytes) -> None:
        with contextlib.suppress(Exception):  # what is wrong with a line, the whole answer tells
            if streamed.add(found):
                told(streamed.text)

    return line


class HttpJudge(Judge):
    """A vision model behind a server, asked `asked`. `max_failures`: see `Judge`; `remedy`: see
    `ChatClient`.
    """

    def __init__(
        self,
        server: Server,
        cache: VerdictCache,
        max_failures: int,
        asked: Question = POINTS_QUESTION,
        remedy: str = "",
    ):
        super().__init__(
            asked.judge("http"),
            f"{server.model}\n{server.max_tokens}\n{asked.prompt}",
            cache,
            max_failures,
        )
        self._asked = asked
        self._client = ChatClient(server, self._count_retry, remedy=remedy)
        self._threads = ThreadPoolExecutor(server.in_flight, thread_name_prefix="judge")

    def ask(self, target: bytes, render: np.ndarray, answer: Answer) -> None:
        self._threads.submit(lambda: answer(self._judge(target, render)))

    def _judge(self, target: bytes, render: np.ndarray) -> Verdict:
        if self._is_down:
            return Verdict(None, problem="the judge is down")
        try:
            content = question(target, png_bytes(render), self._asked)
            answer = self._client.ask([{"role": "user", "content": content}], whole=True)
            found = self._asked.read(answer)
            return dataclasses.replace(found, problem=self._client.shown(found.problem))
        except AnswerCut:
            return cut_off(self._client.server.max_tokens)
        except NoAnswer as problem:
            if problem.fatal:
                self._give_up(str(problem))
            return Verdict(None, problem=str(problem))
        except Exception as problem:  # whatever it is, the trainer waits for a verdict
            return Verdict(None, problem=self._client.shown(f"{type(problem).__name__}: {problem}"))

    def close(self) -> None:
        self._client.close()
        self._threads.shutdown()
        super().close()


def _said(message: dict[str, Any]) -> str | None:
    """The text of a message, None where there is none: `content` is a text or a list of parts.

    Parts that are no answer (what a model thought, a picture, a call) are left out.
    """
    content = message.get("content")
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        kinds = ("text", "output_text")
        texts = [part["text"] for part in parts if part.get("type", "text") in kinds]
        content = "".join(texts) if texts else None
    if content is not None and not isinstance(content, str):
        raise TypeError("the content is neither a text nor parts")
    return content


def question(
    target: bytes, render: bytes, asked: Question = POINTS_QUESTION
) -> list[dict[str, Any]]:
    """The user's message: both pictures (PNG bytes) as data URLs with our instructions around
    them.
    """
    return [
        {"type": "text", "text": asked.before},
        picture(target),
        {"type": "text", "text": asked.between},
        picture(render),
        {"type": "text", "text": asked.after},
    ]


def picture(png: bytes) -> dict[str, Any]:
    """A picture as a part of a message, as a data URL."""
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    return {"type": "image_url", "image_url": {"url": url}}
