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
import weakref
from collections.abc import Sequence
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
from mmrecoder_jax.rl.served.dialects import Dialect, Order, Picture, Question, checked, parsed
from mmrecoder_jax.rl.served.files import PolicyFiles
from mmrecoder_jax.rl.web import Address, BadAnswer, Client, NoAnswer, ServerDown

# Where scripts and the server are both waited for, neither is looked at more rarely.
WAIT_SECONDS = 0.02


@dataclasses.dataclass
class ServedRollouts:
    """Rollouts on a server.

    Attributes:
      address: of the server.
      dialect: how it is asked.
      in_flight: responses that a host asks for at one time.
      files: what it loads.
    """

    address: Address
    dialect: Dialect
    in_flight: int
    files: PolicyFiles
    version: str = ""  # of the weights that the server has loaded
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
    ) -> "ServedRun":
        """A rollout of the policy, which the server has loaded. `in_flight` takes the place of
        `size`.

        Raises:
          ServerDown: it cannot load the policy.
        """
        with progress.phase("weights"):
            self._load(params)
        return ServedRun(self, engine, params, key, groups, turns, progress)

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
                        client.post(
                            order.path,
                            json.dumps(order.body).encode(),
                            functools.partial(_confirmed, order),
                        )
                self.files.forget_old()
        self.version, self._loaded = path.name, [weakref.ref(leaf) for leaf in leaves]

    @contextlib.contextmanager
    def naming_server(self) -> Any:
        """Turns NoAnswer into ServerDown."""
        try:
            yield
        except NoAnswer as problem:
            raise ServerDown(
                f"{self.address.section}.url={self.address.url!r}: {problem}: see that the server "
                "runs and serves this model (docs/rollouts.md, An engine outside the process), and "
                "give the same command again"
            ) from problem


def _confirmed(order: Order, answer: bytes) -> None:
    if not order.confirmed:
        return
    said = parsed(answer)
    if not isinstance(said, dict) or said.get("success") is not True:
        raise BadAnswer(f"{order.path} was not confirmed: {answer[:200]!r}")


class ServedRun:
    """The conversations of one rollout on a server, until all are done."""

    def __init__(
        self,
        rollouts: ServedRollouts,
        engine: Device,
        params: Any,
        key: jax.Array,
        groups: Sequence[Group],
        turns: int,
        progress: Phases,
    ):
        self._rollouts, self._engine, self._params = rollouts, engine, params
        self._groups, self._progress = groups, progress
        self._key = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
        self._vocab_size = engine.sampler.model.config.vocab_size
        self._pictures: dict[ImagePatches, Picture] = {}
        self._left = sum(group.size for group in groups)
        self._waiting: collections.deque[Talk] = collections.deque()
        self._asked = 0
        self._written: queue.SimpleQueue[tuple[Talk, Response | BaseException]]
        self._written = queue.SimpleQueue()
        self.answering = Answering(engine, turns)
        self.stats = Stats()

    def go(self) -> None:
        """Runs all conversations to their ends; all hosts call this together.

        Raises:
          ServerDown: a question stayed without an answer.
        """
        with distributed.together():
            self._converse()
        if self._engine.tower is not None:  # the learner reads its features
            talks = [talk for group in self._groups for talk in group.talks]
            images = [image for t in talks for piece in t.pieces for image in piece.images]
            self._engine.tower.encode(self._params, images)

    def _converse(self) -> None:
        for group in self._groups:
            self._waiting.extend(group.begin())
        client, most = Client(self._rollouts.address), self._rollouts.in_flight
        with self.answering, ThreadPoolExecutor(most, "engine") as threads:
            try:
                while self._left:
                    while self._waiting and self._asked < most:
                        self._asked += 1
                        threads.submit(self._ask, client, self._waiting.popleft())
                    self._wait()
                    self._take_written()
                    self._take_answered()
            finally:  # threads would go on trying
                client.close()

    def _wait(self) -> None:
        """Waits for a response or a script."""
        with self._progress.phase("decode" if self._asked else "execute"):
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
                with self._rollouts.naming_server():
                    raise response
            self.stats.add(len(response.ids), len(response.ids))
            self.answering.ask(talk, response)

    def _take_answered(self) -> None:
        """Goes on with conversations whose scripts have run, before new ones are begun."""
        for talk, feedback in self.answering.listen():
            if feedback is None:
                self._left -= 1
                continue
            talk.pieces.append(feedback)
            parts = not talk.group.parted and talk.turn == talk.group.parts_at
            self._waiting.extendleft(talk.group.part(talk) if parts else [talk])

    # ------------------------------------------------------------ in threads

    def _ask(self, client: Client, talk: Talk) -> None:
        try:
            self._written.put((talk, self._response(client, talk)))
        except BaseException as problem:
            self._written.put((talk, problem))

    def _response(self, client: Client, talk: Talk) -> Response:
        spec, dialect = self._engine.sampler.spec, self._rollouts.dialect
        limit = min(talk.group.limit or spec.response_length, spec.response_length)
        question = Question(
            ids=np.concatenate([piece.ids for piece in talk.pieces]),
            image_id=self._engine.layout.image_id,
            pictures=tuple(self._picture(i) for piece in talk.pieces for i in piece.images),
            limit=limit,
            seed=seed_of(self._key, talk.turn, talk.uid),
            version=self._rollouts.version,
        )

        def read(answer: bytes) -> Response:
            written = dialect.read(parsed(answer), question)
            return checked(written, question, spec, self._vocab_size)

        body = json.dumps(dialect.question(question, spec)).encode()
        return client.post(dialect.path, body, read)

    def _picture(self, image: ImagePatches) -> Picture:
        if image not in self._pictures:
            pixels = pixels_of(image, self._engine.sampler.model.config.vision)
            self._pictures[image] = Picture.of(png_bytes(pixels))
        return self._pictures[image]


def seed_of(key: Sequence[int], turn: int, uid: int) -> int:
    """A seed below 2**31 for the response of one turn of one conversation.

    Args:
      key: words of the rollout's key.
    """
    return int(np.random.SeedSequence([*key, turn, uid]).generate_state(1)[0]) >> 1
