"""The order in which conversations are decoded: none waits for another.

    groups  -> prefill -> members start -> decode, chunk after chunk -> responses
                                ^                                          |  threads: text, code,
                                +------- extend <- feedback <--------------+  execution, scores

`Run` is one rollout on the programs of `rl.sampler`, and `rl.conversations` says who is where.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int

from mmrecoder_jax.data.batching import Piece, VisionLayout
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.answering import Answering, Exchange
from mmrecoder_jax.rl.conversations import Board, Group, Talk
from mmrecoder_jax.rl.sampler import Places, Sampler

A = TypeVar("A")

# With several hosts nobody waits longer for a script before looking at what the others want.
WAIT_SECONDS = 0.02


@runtime_checkable
class Phases(Protocol):
    """What `progress.Progress` offers: a context manager that books time on a named phase."""

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]: ...


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """What a rollout needs to know of the configuration.

    Attributes:
      prompt_length, feedback_length: buckets of a prompt and of one feedback message, in tokens.
      windows: buckets of an image, in windows of the vision tower.
      feedback: `config.feedback`: the kind of image, and the texts of a render and of an error.
      score_mode: ChartMimic rules that turns are scored by.
    """

    prompt_length: int
    feedback_length: int
    windows: tuple[int, ...]
    feedback: Mapping[str, str]
    score_mode: str


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is under way at one time, over all hosts.

    Attributes:
      prompts: groups that have a place; 0: all that are asked for.
      rows: conversations that are decoded side by side; 0: as many as the groups have.
      prefill: prompts or feedbacks that a device reads at one time, between two chunks of decoding.
    """

    prompts: int = 0
    rows: int = 0
    prefill: int = 8

    def places(self, prompts: int, group: int, ways: int, hosts: int) -> tuple[int, int]:
        """(prefixes, rows) of a host whose devices share them `ways` ways.

        Args:
          prompts: that the busiest host is asked for.
        """
        prefixes = _whole(self.prompts // hosts or prompts, ways)
        return prefixes, _whole(self.rows // hosts or prefixes * group, ways)


def _whole(count: int, ways: int) -> int:
    return max(1, -(-count // ways)) * ways


def conversation_slots(
    prompt_length: int, feedback_length: int, response_length: int, turns: int, parts_at: int = 1
) -> tuple[int, int]:
    """Cache slots that a conversation can fill: (with its group, alone).

    A group has the prompt in common, and what comes before turn `parts_at`; alone, a conversation
    has a response per turn, with feedback between turns.

    >>> conversation_slots(prompt_length=40, feedback_length=80, response_length=72, turns=2)
    (40, 224)
    >>> conversation_slots(40, 80, 72, turns=2, parts_at=2)
    (192, 72)
    """
    shared = (parts_at - 1) * (response_length + feedback_length)
    alone = turns - parts_at + 1
    return prompt_length + shared, alone * response_length + (alone - 1) * feedback_length


@dataclasses.dataclass
class Stats:
    """What rollouts did.

    Attributes:
      tokens: sampled by this host's rows.
      row_steps: steps of decoding times rows; those without a token were idle.
    """

    tokens: int = 0
    row_steps: int = 0

    def add(self, tokens: int, row_steps: int) -> None:
        self.tokens += tokens
        self.row_steps += row_steps

    def metrics(self) -> dict[str, float]:
        """Of all hosts: tokens, and the share of the row steps that gave one."""
        tokens, row_steps = distributed.global_sum(np.array([self.tokens, self.row_steps]))
        return {"rollout/tokens": float(tokens), "rollout/use": float(tokens / max(row_steps, 1))}


@runtime_checkable
class Device(Exchange, Protocol):
    """What a run needs of the engine (`rl.rollout.RolloutEngine` is one)."""

    sampler: Sampler
    layout: VisionLayout
    spec: RolloutSpec

    def pad(
        self,
        params: Any,
        pieces: Sequence[Piece],
        before: Sequence[tuple[Piece, ...]],
        length: int,
    ) -> dict[str, np.ndarray]:
        """The sampler's arrays of one piece per row; all hosts call it together."""
        ...


class Run:
    """The conversations of one rollout, until all are done.

    The device decodes chunk after chunk; between two of them, conversations whose feedback is ready
    are extended, prompts are read, and rows that are free are given to those who wait. What costs
    time on the host (text, code, execution, scores, the feedback's image) happens in threads beside
    it. All hosts run the same programs in the same order: each says what it wants, and where one
    wants a program, all run it.
    """

    def __init__(
        self,
        engine: Device,
        params: Any,
        key: jax.Array,
        groups: Sequence[Group],
        turns: int,
        size: Size,
        progress: Phases,
    ):
        self.engine, self.params, self.key, self.turns = engine, params, key, turns
        self.progress, sampler = progress, engine.sampler
        most, members, parts_at = (
            int(x)
            for x in distributed.global_max(
                np.array(
                    [len(groups), *max(((g.size, g.parts_at) for g in groups), default=(1, 1))]
                )
            )
        )
        ways = engine.layout.ways
        prefixes, rows = size.places(most, members, ways, jax.process_count())
        self.board = Board(ways, rows, prefixes, members)
        self.at_once = (
            min(size.prefill, self.board.prefix_part),
            min(size.prefill, self.board.row_part),
        )
        spec, response = engine.spec, sampler.spec.response_length
        slots = conversation_slots(
            spec.prompt_length, spec.feedback_length, response, turns, parts_at
        )
        self.weights = sampler.weights(params)
        self.state = sampler.begin(Places(rows, prefixes, slots[1], slots[0]))
        self.left = sum(group.size for group in groups)
        self.waiting = collections.deque(groups)
        self.starting: collections.deque[Talk] = collections.deque()
        self.active: dict[int, Talk] = {}
        self.answered: list[tuple[Talk, Piece]] = []  # whose feedback is ready
        self.answering = Answering(engine, turns)
        self.stats = Stats()

    def go(self) -> None:
        """Runs all conversations to their ends."""
        with self.answering:
            while True:
                with distributed.together():
                    self._listen()
                    wants = self._wants()
                left, prefill, shared, extend = distributed.global_max(np.array(wants))
                if not left:
                    break
                if prefill:
                    self._prefill()
                if shared:
                    self._extend_shared()
                if extend:
                    self._extend()
                started = [talk for talk in self.starting if self.board.seat(talk)]
                self.starting = collections.deque(t for t in self.starting if t.row is None)
                self.active |= {talk.row: talk for talk in started if talk.row is not None}
                longest = [max((t.group.held for t in self.active.values()), default=0)]
                longest += [max((t.held + t.written for t in self.active.values()), default=0)]
                live, *longest = distributed.global_max(np.array([len(self.active), *longest]))
                if live:
                    self._decode(started, (int(longest[0]), int(longest[1])))
                elif self.answering.outstanding:
                    self._await()

    def _await(self) -> None:
        """Waits for a script where nothing can be decoded."""
        with self.progress.phase("execute"):
            self.answering.wait(None if jax.process_count() == 1 else WAIT_SECONDS)

    def _listen(self) -> None:
        """Takes what has become of responses, without waiting."""
        for talk, feedback in self.answering.listen():
            if feedback is not None:
                self.answered.append((talk, feedback))
                continue
            self.left -= 1
            self.board.leave(talk)
            if all(len(other.turns) == self.turns for other in talk.group.talks):
                self.board.release(talk.group)

    def _wants(self) -> list[int]:
        """(conversations left, whether to read prompts, shared feedback, feedback) of this host."""
        waits_alone = not self.active and not self.answering.outstanding
        shared = sum(not talk.group.parted for talk, _ in self.answered)
        own = len(self.answered) - shared
        few = len(self.active) <= self.board.rows // 2
        idle = self.board.free_rows > len(self.starting)
        prompts = min(len(self.waiting), self.board.free_prefixes)
        full_prefill, full_extend = (x * self.board.ways for x in self.at_once)
        return [
            self.left,
            prompts > 0 and (prompts >= full_prefill or idle or waits_alone),
            shared > 0 and (shared >= full_prefill or few),
            own > 0 and (own >= full_extend or few),
        ]

    # ------------------------------------------------------------ what the device does

    def _prefill(self) -> None:
        each = self.at_once[0]
        most = [each] * self.board.ways
        chosen: list[list[Group]] = [[] for _ in most]
        while self.waiting and self.board.admit(self.waiting[0], most):
            group = self.waiting.popleft()
            way = self.board.way_of(group)
            chosen[way].append(group)
            most[way] -= 1
        groups = self._padded(chosen, each)
        pieces = [self._filler if group is None else group.prompt for group in groups]
        numbers = self._prefixes(groups)
        with self.progress.phase("prefill"):
            length = self.engine.spec.prompt_length
            batch = self.engine.pad(self.params, pieces, [()] * len(pieces), length)
            self.state = self.engine.sampler.prefill(self.params, self.state, batch, numbers)
        for group in filter(None, groups):
            group.held = len(group.prompt.ids)
            self.starting.extend(group.begin())

    def _extend_shared(self) -> None:
        """Feedback on turns that groups have in common: behind their prefixes."""
        talks, pieces = self._chosen(self.at_once[0], shared=True)
        numbers = self._prefixes([None if talk is None else talk.group for talk in talks])
        with self.progress.phase("prefill"):
            batch = self._feedback(talks, pieces)
            sampler = self.engine.sampler
            self.state = sampler.promote(self.state, self._rows(talks), numbers)
            self.state = sampler.extend_prefix(self.params, self.state, batch, numbers)
        for talk, piece in zip(talks, pieces, strict=True):
            if talk is None:
                continue
            talk.group.held += talk.held + len(piece.ids)
            talk.pieces.append(piece)
            self.board.leave(talk)
            parts = talk.turn == talk.group.parts_at
            self.starting.extend(talk.group.part(talk) if parts else [talk])

    def _extend(self) -> None:
        """Feedback to conversations that have parted: in their rows, which go on."""
        talks, pieces = self._chosen(self.at_once[1], shared=False)
        numbers = self._prefixes([None if talk is None else talk.group for talk in talks])
        with self.progress.phase("prefill"):
            batch = self._feedback(talks, pieces)
            self.state = self.engine.sampler.extend(
                self.params, self.state, batch, self._rows(talks), numbers
            )
        for talk, piece in zip(talks, pieces, strict=True):
            if talk is not None:
                talk.pieces.append(piece)
                talk.held, talk.written = talk.held + len(piece.ids), 0
                assert talk.row is not None
                self.active[talk.row] = talk

    def _decode(self, started: Sequence[Talk], longest: tuple[int, int]) -> None:
        sampler = self.engine.sampler
        with self.progress.phase("decode"):
            plan = self.board.plan(started, sampler.spec.response_length)
            self.state = sampler.decode(self.weights, self.state, plan, self.key, longest)
            live, count = (distributed.to_host(x) for x in (self.state.live, self.state.count))
            steps = max((count[row] - t.written for row, t in self.active.items()), default=0)
            tokens = sum(int(count[row]) - talk.written for row, talk in self.active.items())
            self.stats.add(tokens, int(steps) * self.board.rows)
            for row, talk in self.active.items():
                talk.written = int(count[row])
            finished = [row for row in self.active if not live[row]]
            responses = sampler.responses(self.state, finished)
        for row, response in zip(finished, responses, strict=True):
            talk = self.active.pop(row)
            talk.held += talk.written
            talk.written = 0
            self.answering.ask(talk, response)

    # ------------------------------------------------------------ arrays of one size

    @property
    def _filler(self) -> Piece:
        return Piece(np.array([self.engine.layout.pad_id], np.int32), 0)

    def _padded(self, chosen: Sequence[Sequence[A]], each: int) -> list[A | None]:
        """The items of each part in order, filled up with None."""
        return [item for part in chosen for item in [*part, *[None] * (each - len(part))]]

    def _chosen(self, each: int, shared: bool) -> tuple[list[Talk | None], list[Piece]]:
        """Conversations whose feedback is read now, `each` of a part, and the feedback."""
        chosen: list[list[tuple[Talk, Piece]]] = [[] for _ in range(self.board.ways)]
        later = []
        for talk, piece in self.answered:
            part = chosen[self.board.way_of(talk.group)]
            if talk.group.parted != shared and len(part) < each:
                part.append((talk, piece))
            else:
                later.append((talk, piece))
        self.answered = later
        pairs = self._padded(chosen, each)
        talks = [None if pair is None else pair[0] for pair in pairs]
        return talks, [self._filler if pair is None else pair[1] for pair in pairs]

    def _feedback(
        self, talks: Sequence[Talk | None], pieces: Sequence[Piece]
    ) -> dict[str, np.ndarray]:
        before = [() if talk is None else tuple(talk.pieces) for talk in talks]
        return self.engine.pad(self.params, pieces, before, self.engine.spec.feedback_length)

    def _prefixes(self, groups: Sequence[Group | None]) -> Int[np.ndarray, " N"]:
        part = self.board.prefix_part
        return np.array(
            [part if g is None or g.prefix is None else g.prefix % part for g in groups]
        )

    def _rows(self, talks: Sequence[Talk | None]) -> Int[np.ndarray, " N"]:
        part = self.board.row_part
        return np.array([part if t is None or t.row is None else t.row % part for t in talks])
