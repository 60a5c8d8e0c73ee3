"""Conversations that a server decodes, many at one time; none waits for another.

    waiting -> asked, in threads -> responses -> code, execution, scores -> feedback -> waiting

Before a rollout the server loads the policy, where it has changed.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import queue
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.processor import ImagePatches, pixels_of
from mmrecoder_jax.rl.answering import Answering
from mmrecoder_jax.rl.conversations import Group, Talk
from mmrecoder_jax.rl.sampler import Response
from mmrecoder_jax.rl.schedule import Device, Phases, Size, Stats
from mmrecoder_jax.rl.served.dialects import (
    Dialect,
    Order,
    Picture,
    Question,
    checked,
    parsed,
    until_stop,
)
from mmrecoder_jax.rl.served.files import PolicyFiles
from mmrecoder_jax.rl.web import Address, BadAnswer, Client, NoAnswer, ServerDown

# Where scripts and the server are both waited for, neither is looked at more rarely.
WAIT_SECONDS = 0.02
_MEASURED = ("rollout/tokens", "rollout/read", "rollout/idle")


class ServedStats(Stats):
    """What one rollout did on a server, whose rows and caches nobody here sees."""

    def metrics(self) -> dict[str, float]:
        """Of all hosts: tokens that were written and sent, and how long our devices were idle."""
        return {name: x for name, x in super().metrics().items() if name in _MEASURED}


@dataclasses.dataclass
class ServedDecoder:
    """Rollouts on a server.

    Attributes:
      address: of the server.
      dialect: how it is asked.
      in_flight: responses that a host asks for at one time.
      files: what it loads.
      version: of the weights that it has loaded.
    """

    address: Address
    dialect: Dialect
    in_flight: int
    files: PolicyFiles
    version: str = ""
    _loaded: list[weakref.ref] = dataclasses.field(default_factory=list)

    def __call__(
        self,
        engine: Device,
        params: Any,
        key: jax.Array,
        groups: Sequence[Group],
        turns: int,
        size: Size,
        progress: Phases,
        budget: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ) -> "ServedRun":
        """A rollout of the policy, which the server has loaded. `in_flight` takes the place of
        `size`.

        Raises:
          ServerDown: it cannot load the policy.
        """
        with progress.phase("weights"):
            self._load(params)
        return ServedRun(
            self, engine, params, key, groups, turns, progress, budget, meanwhile or _nothing
        )

    def _load(self, params: Any) -> None:
        leaves = jax.tree.leaves(params)
        known = len(leaves) == len(self._loaded) and all(
            reference() is leaf for reference, leaf in zip(self._loaded, leaves, strict=True)
        )
        if distributed.main_says(known):
            return
        self._loaded = []
        path = self.files.write(params)
        with distributed.together():
            if distributed.is_main():
                with contextlib.closing(Client(self.address)) as client, self.naming_server():
                    for order in self.dialect.loading(str(path), path.name):
                        body = json.dumps(order.body).encode()
                        client.post(order.path, body, functools.partial(_confirmed, order))
                self.files.forget_old()
        self.version, self._loaded = path.name, [weakref.ref(leaf) for leaf in leaves]

    @contextlib.contextmanager
    def naming_server(self) -> Iterator[None]:
        """Turns NoAnswer into ServerDown."""
        try:
            yield
        except NoAnswer as problem:
            raise ServerDown(
                f"{self.address.section}.url={self.address.url!r}: {problem}: see that the server "
                "runs and serves this model (docs/rollouts.md, An engine outside the process), and "
                "give the same command again"
            ) from problem


def _nothing() -> None:
    pass


def _confirmed(order: Order, answer: bytes) -> None:
    if not order.confirmed:
        return
    said = parsed(answer)
    if not isinstance(said, dict) or said.get("success") is not True:
        raise BadAnswer(f"{order.path} was not confirmed: {answer[:200]!r}")


class ServedRun:
    """The conversations of one rollout on a server, until all are done or rest."""

    def __init__(
        self,
        decoder: ServedDecoder,
        engine: Device,
        params: Any,
        key: jax.Array,
        groups: Sequence[Group],
        turns: int,
        progress: Phases,
        budget: int,
        meanwhile: Callable[[], None],
    ):
        self._decoder, self._engine, self._params = decoder, engine, params
        self._groups, self._turns, self._progress = groups, turns, progress
        self._budget, self._meanwhile = budget, meanwhile
        self._longest = engine.sampler.spec.response_length
        self._vocab_size = engine.sampler.model.config.vocab_size
        self._key = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
        self._client = Client(decoder.address)
        self._pictures: dict[ImagePatches, Picture] = {}
        self._left = sum(group.left(turns) for group in groups)
        self._waiting: collections.deque[Talk] = collections.deque()
        self._asked = 0
        self._written: queue.SimpleQueue[tuple[Talk, Response | BaseException]]
        self._written = queue.SimpleQueue()
        self.answering = Answering(engine, turns)
        self.stats: Stats = ServedStats()

    def go(self) -> None:
        """Runs all conversations to their ends, or until they rest; all hosts call this together.

        Raises:
          ServerDown: a question stayed without an answer.
        """
        began = time.monotonic()
        with ThreadPoolExecutor(1, "engine") as beside:
            talking = beside.submit(self._converse)
            try:
                self._meanwhile()
                busy = time.monotonic() - began
                with self._progress.phase("decode"), distributed.together():
                    talking.result()
            except BaseException:
                self._client.close()  # or the thread would go on asking
                raise
        if self._engine.tower is not None:  # the learner reads its features
            talks = [talk for group in self._groups for talk in group.talks]
            images = [image for t in talks for piece in t.pieces for image in piece.images]
            self._engine.tower.encode(self._params, images)
        self.stats.seconds, self.stats.busy_seconds = time.monotonic() - began, busy

    # ------------------------------------------------------------ in a thread

    def _converse(self) -> None:
        for group in self._groups:
            if not group.talks:
                group.begin()
            for talk in group.talks:
                talk.resting = False
                if len(talk.turns) < self._turns:
                    self._waiting.append(talk)
        most = self._decoder.in_flight
        with self.answering, ThreadPoolExecutor(most, "engine") as threads:
            try:
                while self._left:
                    while self._waiting and self._asked < most:
                        self._asked += 1
                        talk = self._waiting.popleft()
                        self.stats.shown += sum(len(piece.ids) for piece in talk.pieces)
                        threads.submit(self._ask, talk)
                    self._wait()
                    self._take_written()
                    self._take_answered()
            finally:  # threads would go on trying
                self._client.close()

    def _wait(self) -> None:
        """Waits for a response or a script."""
        if not self._asked:
            self.answering.wait(None)
            return
        with contextlib.suppress(queue.Empty):
            seconds = WAIT_SECONDS if self.answering.outstanding else None
            self._written.put(self._written.get(timeout=seconds))

    def _take_written(self) -> None:
        """Has the code of responses run."""
        while True:
            try:
                talk, response = self._written.get_nowait()
            except queue.Empty:
                return
            self._asked -= 1
            if isinstance(response, BaseException):
                with self._decoder.naming_server():
                    raise response
            self.stats.tokens += len(response.ids)
            if talk.draft is not None:
                response = _behind(talk.draft, response)
            response = until_stop(response, self._engine.sampler.spec.stop)
            if not response.finished and len(response.ids) < talk.limit(self._longest):
                talk.draft, talk.resting = response, True
                self._left -= 1 if talk.group.parted else talk.group.size
                continue
            talk.draft = None
            self.answering.ask(talk, response)

    def _take_answered(self) -> None:
        """Goes on with conversations whose scripts have run, before new ones are begun."""
        for talk, feedback in self.answering.listen():
            if feedback is None:
                self._left -= 1
                continue
            talk.pieces.append(feedback)
            group, parts = talk.group, [talk]
            if not group.parted and talk.turn == group.parts_at:
                group.part()
                parts = group.talks
            self._waiting.extendleft(parts)

    # ------------------------------------------------------------ in many threads

    def _ask(self, talk: Talk) -> None:
        try:
            self._written.put((talk, self._response(talk)))
        except BaseException as problem:
            self._written.put((talk, problem))

    def _response(self, talk: Talk) -> Response:
        """What the server writes next: a response, or more of one."""
        spec, dialect = self._engine.sampler.spec, self._decoder.dialect
        begun = [] if talk.draft is None else [talk.draft.ids]
        question = Question(
            ids=np.concatenate([*(piece.ids for piece in talk.pieces), *begun]),
            image_id=self._engine.layout.image_id,
            pictures=tuple(self._picture(i) for piece in talk.pieces for i in piece.images),
            limit=talk.limit(self._longest, self._budget) - sum(map(len, begun)),
            seed=seed_of(self._key, talk.turn, talk.uid),
            version=self._decoder.version,
        )

        def read(answer: bytes) -> Response:
            written = dialect.read(parsed(answer), question)
            return checked(written, question, spec, self._vocab_size)

        body = json.dumps(dialect.question(question, spec)).encode()
        return self._client.post(dialect.path, body, read)

    def _picture(self, image: ImagePatches) -> Picture:
        if image not in self._pictures:
            pixels = pixels_of(image, self._engine.sampler.model.config.vision)
            self._pictures[image] = Picture.of(png_bytes(pixels))
        return self._pictures[image]


def _behind(draft: Response, more: Response) -> Response:
    """A response of its beginning and the rest."""
    ids = np.concatenate([draft.ids, more.ids])
    logps = np.concatenate([draft.logps, more.logps])
    return Response(ids, logps, more.finished, logps)


def seed_of(key: Sequence[int], turn: int, uid: int) -> int:
    """A seed below 2**31 for the response of one turn of one conversation.

    Args:
      key: words of the rollout's key.
    """
    return int(np.random.SeedSequence([*key, turn, uid]).generate_state(1)[0]) >> 1
