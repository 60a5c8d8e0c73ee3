"""The order in which conversations are decoded: none waits for another.

    groups  -> prefill -> members start -> decode, chunk after chunk -> responses
                                ^                                          |  threads: text, code,
                                +------- extend <- feedback <--------------+  execution, scores

`Run` is one rollout on the programs of `rl.sampler`, and `rl.conversations` says who is where.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int

from mmrecoder_jax.data.batching import Piece, VisionLayout
from mmrecoder_jax.env.chart_env import FeedbackImage
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.answering import Answering, Exchange
from mmrecoder_jax.rl.conversations import Board, Group, Talk
from mmrecoder_jax.rl.sampler import Places, Response, Sampler
from mmrecoder_jax.rl.vision_features import FrozenTower

A = TypeVar("A")
Holder = TypeVar("Holder", Group, Talk)

# With several hosts nobody waits longer for a script before looking at what the others want.
WAIT_SECONDS = 0.02

# Metrics of a rollout that depend on how fast scripts run, and the judge answers.
TIMED = (
    *(f"rollout/{name}" for name in ("use", "padding", "cache_use", "idle")),
    *("judge/latency_mean", "judge/latency_max"),
)


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

    @property
    def pictures(self) -> int:
        """How many pictures the feedback on a render shows."""
        return FeedbackImage(self.feedback["image"]).pictures


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is under way at one time, over all hosts.

    Attributes:
      prompts: groups that have a place; 0: all that are asked for.
      rows: conversations that are decoded side by side; 0: as many as the groups have.
      prefill: prompts or feedbacks that a device reads at one time, between two chunks of decoding.
      members: that a group has places for, at least: an evaluation with one conversation a chart
        runs the programs of a rollout with G.
    """

    prompts: int = 0
    rows: int = 0
    prefill: int = 8
    members: int = 1

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
    """What one rollout did, on this host.

    Attributes:
      tokens: sampled.
      row_steps: steps of decoding times rows; those without a token were idle.
      shown: tokens of prompts and feedback that were read.
      slots_shown: of the arrays that they were read in.
      valid, slots: of the caches, added up over the steps of decoding.
      seconds: from the beginning to the end.
      busy_seconds: of them, while a program was under way on the devices.
    """

    tokens: int = 0
    row_steps: int = 0
    shown: int = 0
    slots_shown: int = 0
    valid: int = 0
    slots: int = 0
    seconds: float = 0.0
    busy_seconds: float = 0.0

    def add(self, other: "Stats") -> None:
        """Adds what another rollout did."""
        for field in dataclasses.fields(self):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)

    def metrics(self) -> dict[str, float]:
        """Of all hosts: see docs/rollouts.md."""
        own = [self.tokens, self.row_steps, self.shown, self.slots_shown, self.valid, self.slots]
        total = distributed.global_sum(np.array([*own, self.seconds, self.busy_seconds], float))
        tokens, row_steps, shown, slots_shown, valid, slots, seconds, busy = map(float, total)
        return {
            "rollout/tokens": tokens,
            "rollout/read": shown,
            "rollout/use": tokens / max(row_steps, 1),
            "rollout/padding": 1 - shown / max(slots_shown, 1),
            "rollout/cache_use": valid / max(slots, 1),
            "rollout/idle": 1 - busy / seconds if seconds else 0.0,
        }


class _Clock:
    """How long programs are under way: from the first that is started until they are waited for.

    The devices may have ended a little sooner, so it counts rather too much than too little.
    """

    def __init__(self) -> None:
        self.busy = 0.0
        self._since: float | None = None

    def started(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    @property
    def runs(self) -> bool:
        """Whether a program was started that was not waited for."""
        return self._since is not None

    def waited(self) -> None:
        if self._since is not None:
            self.busy += time.monotonic() - self._since
            self._since = None


@runtime_checkable
class Device(Exchange, Protocol):
    """What a run needs of the engine (`rl.rollout.RolloutEngine` is one)."""

    sampler: Sampler
    layout: VisionLayout
    spec: RolloutSpec
    tower: FrozenTower | None

    def pad(
        self,
        params: Any,
        pieces: Sequence[Piece],
        before: Sequence[Sequence[Piece]],
        bucket: "Bucket",
    ) -> dict[str, np.ndarray]:
        """The sampler's arrays of one piece per row; all hosts call it together."""
        ...


@dataclasses.dataclass(frozen=True)
class Bucket:
    """How much a row of a program that reads has room for.

    Attributes:
      length: tokens.
      shown: pictures, of a prompt or of the feedbacks in it.
    """

    length: int
    shown: int


class Run:
    """The conversations of one rollout, until all are done.

    The device decodes chunk after chunk; between two of them, conversations whose feedback is ready
    are extended, prompts are read, and rows that are free are given to those who wait. What costs
    time on the host (text, code, execution, scores, the feedback's image) happens in threads beside
    it (`rl.answering`). All hosts run the same programs in the same order: each says what it wants,
    and where one wants a program, all run it.

    Where there are fewer rows than conversations, a conversation leaves its row while its script
    runs, and what it holds is read again when it goes on. Whether it does so depends on the sizes
    alone and never on time, so that its numbers are the same to the bit in every run.

    Args:
      groups: fresh ones, and those that rested in an earlier rollout.
      budget: tokens that a response may have written when it rests, to be finished in a later
        rollout; 0: none rests.
      meanwhile: work of the devices that is done while all conversations wait for scripts.
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
        budget: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ):
        self.engine, self.params, self.key, self.turns = engine, params, key, turns
        self.progress, sampler, self.budget = progress, engine.sampler, budget
        self._meanwhile = meanwhile
        asked = max(((g.size, g.parts_at) for g in groups), default=(1, 1))
        asked = max(asked[0], size.members), asked[1]
        shown = max((len(group.prompt.images) for group in groups), default=1)
        most, members, parts_at, shown = (
            int(x) for x in distributed.global_max(np.array([len(groups), *asked, shown]))
        )
        ways = engine.layout.ways
        prefixes, rows = size.places(most, members, ways, jax.process_count())
        self.board = Board(ways, rows, prefixes, members)
        self._parks = rows < prefixes * members and turns > parts_at
        self._shares = parts_at > 1
        prefill, extend = (
            min(size.prefill, part) for part in (self.board.prefix_part, self.board.row_part)
        )
        spec, response = engine.spec, sampler.spec.response_length
        slots = conversation_slots(
            spec.prompt_length, spec.feedback_length, response, turns, parts_at
        )
        pictures = spec.pictures if turns > 1 else 1
        feedback = Bucket(spec.feedback_length, pictures)
        # Feedback is read where the rest is held already; everything, where it is not.
        self._reads = {
            "prompt": _Reads(Bucket(spec.prompt_length, shown), prefill),
            "shared feedback": _Reads(feedback, prefill),
            "shared turns": _Reads(
                Bucket(slots[0] - spec.prompt_length, max(1, parts_at - 1) * pictures), prefill
            ),
            "feedback": _Reads(feedback, extend),
            "own turns": _Reads(Bucket(slots[1], max(1, turns - parts_at) * pictures), extend),
        }
        self._weights = sampler.weights(params)
        self._state = sampler.begin(Places(rows, prefixes, slots[1], slots[0]))
        self._slots = rows * slots[1] + prefixes * slots[0]
        self._left = sum(group.left(turns) for group in groups)
        self._waiting = collections.deque(groups)
        self._starting: collections.deque[Talk] = collections.deque()
        self._active: dict[int, Talk] = {}
        self._started: list[Talk] = []  # of them, those that begin behind their prefix
        # Where the devices are the host's cores, steps with few rows only hold up the scripts.
        self._patient = sampler.mesh.devices.flat[0].platform == "cpu"
        self._clock = _Clock()
        self.answering = Answering(engine, turns)
        self.stats = Stats()

    def go(self) -> None:
        """Runs all conversations to their ends, or until they rest."""
        began = time.monotonic()
        with self.answering:
            while True:
                with distributed.together():
                    self._listen()
                    wants = self._wants()
                left, *wanted = distributed.global_max(np.array(wants))
                if not left:
                    break
                waiting = len(self._waiting)
                for name, want in zip(self._reads, wanted, strict=True):
                    if want:
                        self._read(name)
                started = [talk for talk in self._starting if self.board.seat(talk)]
                self._starting = collections.deque(t for t in self._starting if t.row is None)
                self._active |= {talk.row: talk for talk in started if talk.row is not None}
                self._started += started
                # A chunk costs the same however few rows are live: they are filled first.
                fills = len(self._waiting) < waiting and self._has_room
                live, outstanding, filling = distributed.global_sum(
                    np.array([len(self._active), self.answering.outstanding, fills])
                )
                if filling:
                    continue
                if live and not (self._patient and live < outstanding):
                    self._decode()
                elif self._meanwhile is not None:
                    self._do_meanwhile()
                elif self.answering.outstanding:
                    self._await()
        self._do_meanwhile()
        self.stats.seconds = time.monotonic() - began
        self.stats.busy_seconds = self._clock.busy

    @property
    def _has_room(self) -> bool:
        """Whether more prompts could be read, and rows are free for them."""
        return min(len(self._waiting), self.board.free_prefixes, self.board.free_rows) > 0

    def _do_meanwhile(self) -> None:
        work, self._meanwhile = self._meanwhile, None
        if work is not None:
            self._clock.started()
            work()
            self._clock.waited()

    def _await(self) -> None:
        """Waits for a script where nothing can be decoded."""
        with self.progress.phase("execute"):
            if self._clock.runs:
                jax.block_until_ready(self._state.lengths)
                self._clock.waited()
            self.answering.wait(None if jax.process_count() == 1 else WAIT_SECONDS)

    def _listen(self) -> None:
        """Takes what has become of responses, without waiting."""
        for talk, feedback in self.answering.listen():
            group = talk.group
            if feedback is None:
                self._left -= 1
                if talk.row is not None:
                    self.board.leave(talk)
                self._release(group)
                continue
            talk.pieces.append(feedback)
            if not group.parted:
                self._reads["shared feedback"].groups.append(group)
            elif talk.row is None:
                self._reads["own turns"].talks.append(talk)
            else:
                self._reads["feedback"].talks.append(talk)

    def _release(self, group: Group) -> None:
        """Takes a group's prefix back where none of its conversations goes on."""
        if all(talk.resting or len(talk.turns) == self.turns for talk in group.talks):
            self.board.release(group)

    def _wants(self) -> list[int]:
        """(conversations left, whether to read each of `_reads`) of this host."""
        few = len(self._active) <= self.board.rows // 2
        outstanding = self.answering.outstanding

        def due(name: str, count: int) -> bool:
            """Whether so many are read now: as many as one call takes, or nobody else comes."""
            soon = count >= outstanding if self._patient else few
            return count > 0 and (count >= self._whole(name) or soon)

        waits_alone = not self._active and not self.answering.outstanding
        idle = self.board.free_rows > len(self._starting)
        prompts = min(len(self._waiting), self.board.free_prefixes)
        own = self.board.seats_for(self._reads["own turns"].talks)
        wants = [prompts > 0 and (prompts >= self._whole("prompt") or idle or waits_alone)]
        for name in ("shared feedback", "shared turns"):
            wants.append(due(name, len(self._reads[name].groups)))
        wants.append(due("feedback", len(self._reads["feedback"].talks)))
        wants.append(due("own turns", own))
        return [self._left, *wants]

    def _whole(self, name: str) -> int:
        return self._reads[name].each * self.board.ways

    # ------------------------------------------------------------ what the device reads

    def _read(self, name: str) -> None:
        if name == "prompt":
            self._prefill()
        elif name.startswith("shared"):
            self._extend_shared(self._reads[name])
        else:
            self._extend(self._reads[name])

    def _prefill(self) -> None:
        reads = self._reads["prompt"]
        most = [reads.each] * self.board.ways
        chosen: list[list[Group]] = [[] for _ in most]
        while self._waiting and self.board.admit(self._waiting[0], most):
            group = self._waiting.popleft()
            way = self.board.way_of(group)
            chosen[way].append(group)
            most[way] -= 1
        groups = self._padded(chosen, reads.each)
        with self.progress.phase("prefill"):
            pieces = [None if group is None else group.prompt for group in groups]
            batch = self._arrays(pieces, [()] * len(pieces), reads.bucket)
            self._state = self.engine.sampler.prefill(
                self.params, self._state, batch, self._prefixes(groups)
            )
        for group in filter(None, groups):
            if not group.talks:
                group.begin()
            group.read, group.held = 1, len(group.prompt.ids)
            if group.read < len(group.common):
                self._reads["shared turns"].groups.append(group)
            else:
                self._go_on(group)

    def _extend_shared(self, reads: "_Reads") -> None:
        """What a group's conversations have in common, behind its prefix."""
        chosen: list[list[Group]] = [[] for _ in range(self.board.ways)]
        reads.groups = self._dealt(reads.groups, chosen, reads.each)
        groups = self._padded(chosen, reads.each)
        pieces = [
            None if group is None else _joined(group.common[group.read :]) for group in groups
        ]
        before = [() if group is None else group.common[: group.read] for group in groups]
        with self.progress.phase("prefill"):
            batch = self._arrays(pieces, before, reads.bucket)
            self._state = self.engine.sampler.extend_prefix(
                self.params, self._state, batch, self._prefixes(groups)
            )
        for group, piece in zip(groups, pieces, strict=True):
            if group is None or piece is None:
                continue
            group.held += len(piece.ids)
            group.read = len(group.common)
            if not group.parted and group.talks[0].turn == group.parts_at:
                group.part()
            self._go_on(group)

    def _go_on(self, group: Group) -> None:
        """A group's conversations, whose prefix is there, decode their next turns."""
        for talk in group.talks:
            talk.read, talk.resting = group.read, False
            if len(talk.turns) == self.turns:
                continue
            if talk.unread or talk.draft is not None:
                self._reads["own turns"].talks.append(talk)
            else:
                self._starting.append(talk)

    def _extend(self, reads: "_Reads") -> None:
        """Feedback, or all that they held, to conversations, which then decode a turn."""
        chosen: list[list[Talk]] = [[] for _ in range(self.board.ways)]
        reads.talks = self._dealt(reads.talks, chosen, reads.each)
        talks = self._padded(chosen, reads.each)
        pieces = [None if talk is None else _joined(_unread(talk)) for talk in talks]
        before = [() if talk is None else talk.pieces[: talk.read] for talk in talks]
        with self.progress.phase("prefill"):
            batch = self._arrays(pieces, before, reads.bucket)
            self._state = self.engine.sampler.extend(
                self.params,
                self._state,
                batch,
                self._rows(talks),
                self._prefixes([None if talk is None else talk.group for talk in talks]),
                np.array([0 if talk is None else talk.held for talk in talks]),
                [None if talk is None else talk.draft for talk in talks],
            )
        for talk, piece in zip(talks, pieces, strict=True):
            if talk is None or piece is None:
                continue
            talk.written = 0 if talk.draft is None else len(talk.draft.ids)
            talk.held += len(piece.ids) - talk.written
            talk.read = len(talk.pieces)
            assert talk.row is not None
            self._active[talk.row] = talk

    def _dealt(
        self, waiting: Sequence[Holder], chosen: Sequence[list[Holder]], each: int
    ) -> list[Holder]:
        """Gives each part at most so many of those who wait; returns those who still do.

        A conversation without a row needs a free one.
        """
        later = []
        for one in waiting:
            part = chosen[self.board.way_of(one if isinstance(one, Group) else one.group)]
            if len(part) < each and (
                isinstance(one, Group) or one.row is not None or self.board.seat(one)
            ):
                part.append(one)
            else:
                later.append(one)
        return later

    # ------------------------------------------------------------ what the device writes

    def _decode(self) -> None:
        active = self._active.values()
        own = [max((talk.group.held for talk in active), default=0)]
        own += [max((talk.held + talk.written for talk in active), default=0)]
        longest = distributed.global_max(np.array(own)).tolist()
        sampler, stats = self.engine.sampler, self.stats
        whole = sampler.spec.response_length
        with self.progress.phase("decode"):
            plan = self.board.plan(self._started, whole, self.budget)
            self._started = []
            self._clock.started()
            self._state = sampler.decode(
                self._weights, self._state, plan, self.key, (longest[0], longest[1])
            )
            live, count = (distributed.to_host(x) for x in (self._state.live, self._state.count))
            self._clock.waited()
            written = {row: int(count[row]) - talk.written for row, talk in self._active.items()}
            steps = max(written.values(), default=0)
            groups = {id(t.group): t.group.held for t in self._active.values()}
            stats.tokens += sum(written.values())
            stats.row_steps += steps * self.board.rows
            stats.valid += steps * sum(groups.values())
            stats.valid += steps * sum(t.held + t.written for t in self._active.values())
            stats.slots += steps * self._slots
            for row, talk in self._active.items():
                talk.written = int(count[row])
            finished = [row for row in self._active if not live[row]]
            responses = sampler.responses(self._state, finished)
            self._tell([row for row in self._active if live[row]])
        ended = []
        for row, response in zip(finished, responses, strict=True):
            talk = self._active.pop(row)
            talk.held, talk.written = talk.held + talk.written, 0
            cut = not response.finished and len(response.ids) < talk.limit(whole)
            if cut and self.budget:
                self._rest(talk, response)
                continue
            talk.draft = None
            talk.read += 1  # the response, whose piece is written with its answer
            ended.append(talk)
            self.answering.ask(talk, response)
        if self._shares:
            self._promote([talk for talk in ended if not talk.group.parted])
        for talk in ended:
            if talk.group.parted and (self._parks or talk.turn == self.turns):
                self.board.leave(talk)

    def _tell(self, rows: Sequence[int]) -> None:
        """Gives responses that go on to those who hear them."""
        rows = [row for row in rows if self._active[row].heard is not None]
        for row, response in zip(
            rows, self.engine.sampler.responses(self._state, rows), strict=True
        ):
            heard = self._active[row].heard
            assert heard is not None
            heard(response.ids)

    def _rest(self, talk: Talk, response: Response) -> None:
        """A response that is to be finished in a later rollout."""
        talk.draft, talk.resting = response, True
        self._left -= 1 if talk.group.parted else talk.group.size
        self.board.leave(talk)
        self._release(talk.group)

    def _promote(self, talks: Sequence[Talk]) -> None:
        """Moves turns that groups have in common behind their prefixes; their rows are free."""
        each = self._reads["shared feedback"].each
        parts: list[list[Talk]] = [[] for _ in range(self.board.ways)]
        for talk in talks:
            parts[self.board.way_of(talk.group)].append(talk)
        most = int(distributed.global_max(np.array([max(map(len, parts))]))[0])
        for first in range(0, most, each):
            some = self._padded([part[first : first + each] for part in parts], each)
            numbers = self._prefixes([None if talk is None else talk.group for talk in some])
            self._clock.started()
            self._state = self.engine.sampler.promote(self._state, self._rows(some), numbers)
        for talk in talks:
            talk.group.read, talk.group.held = talk.read, talk.group.held + talk.held
            self.board.leave(talk)

    # ------------------------------------------------------------ arrays of one size

    def _arrays(
        self, pieces: Sequence[Piece | None], before: Sequence[Sequence[Piece]], bucket: Bucket
    ) -> dict[str, np.ndarray]:
        """The arrays of what is read next; the devices are taken to be busy from here on."""
        filler = Piece(np.array([self.engine.layout.pad_id], np.int32), 0)
        filled = [filler if piece is None else piece for piece in pieces]
        self.stats.shown += sum(len(piece.ids) for piece in pieces if piece is not None)
        self.stats.slots_shown += len(pieces) * bucket.length
        batch = self.engine.pad(self.params, filled, before, bucket)
        self._clock.started()
        return batch

    def _padded(self, chosen: Sequence[Sequence[A]], each: int) -> list[A | None]:
        """The items of each part in order, filled up with None."""
        return [item for part in chosen for item in [*part, *[None] * (each - len(part))]]

    def _prefixes(self, groups: Sequence[Group | None]) -> Int[np.ndarray, " N"]:
        part = self.board.prefix_part
        return np.array(
            [part if g is None or g.prefix is None else g.prefix % part for g in groups]
        )

    def _rows(self, talks: Sequence[Talk | None]) -> Int[np.ndarray, " N"]:
        part = self.board.row_part
        return np.array([part if t is None or t.row is None else t.row % part for t in talks])


@dataclasses.dataclass
class _Reads:
    """What waits to be read by one program.

    Attributes:
      bucket: of a row.
      each: rows of a part that are read at one time.
      groups, talks: whose prefixes, or rows, are to be extended.
    """

    bucket: Bucket
    each: int
    groups: list[Group] = dataclasses.field(default_factory=list)
    talks: list[Talk] = dataclasses.field(default_factory=list)


def _unread(talk: Talk) -> list[Piece]:
    """The pieces that a conversation's row does not hold, and the beginning of its response."""
    draft = [] if talk.draft is None else [Piece(talk.draft.ids, talk.turn)]
    return [*talk.unread, *draft]


def _joined(pieces: Sequence[Piece]) -> Piece:
    """One piece of several, for programs that read them at once."""
    images = tuple(image for piece in pieces for image in piece.images)
    return Piece(np.concatenate([piece.ids for piece in pieces]), 0, images)
