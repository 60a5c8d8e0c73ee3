"""Which conversation is in which row of the sampler, and which group has which prefix.

    waiting -> a prefix, filled -> members, each: a row, turn, feedback, turn, ... -> done
               shared turns: one row, turn, promoted; feedback behind the prefix

A group keeps its prefix until its last conversation is done, or rests until a later rollout. A
conversation keeps its row from its first turn to its last; where rows are few it leaves its row
while its script runs, and what it holds is read again later. Rows and prefixes are cut into `ways`
parts, one per device of this host that shares rows; a group's rows are in the part of its prefix.
Plain bookkeeping: nothing here computes.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Int

from mmrecoder_jax.data.batching import Piece
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.rl.sampler import Plan, Response
from mmrecoder_jax.rl.trajectory import Turn


@dataclasses.dataclass(eq=False)
class Group:
    """A chart and the conversations about it.

    Attributes:
      uid: what decides random numbers, together with the step's key.
      size: G.
      parts_at: the turn before which the G conversations part; turns before it are written once.
      prompt: what the policy is asked.
      prefix: its place; None while it waits for one.
      talks: the conversations: one that all members have in common, then G that have parted.
      parted: whether they have.
      read: pieces that its prefix holds.
      held: slots of its prefix that hold something.
      limit: tokens after which a response is cut; 0: the longest that the sampler has room for.
    """

    chart: Chart
    uid: int
    size: int
    parts_at: int
    prompt: Piece
    prefix: int | None = None
    talks: list["Talk"] = dataclasses.field(default_factory=list)
    parted: bool = False
    read: int = 0
    held: int = 0
    limit: int = 0

    def begin(self) -> None:
        """Starts its conversations: G that part at once, or the one they have in common."""
        self.talks = [Talk(self, self.uid, [self.prompt], [])]
        if self.parts_at == 1:
            self.part()

    def part(self) -> None:
        """Makes G conversations of one, each with its own random numbers."""
        (trunk,) = self.talks
        self.talks = [
            Talk(
                self,
                self.uid if self.size == 1 else member_uid(self.uid, member),
                list(trunk.pieces),
                list(trunk.turns),
            )
            for member in range(self.size)
        ]
        self.parted = True

    @property
    def rests(self) -> bool:
        """Whether one of its conversations waits for a later rollout."""
        return any(talk.resting for talk in self.talks)

    @property
    def common(self) -> Sequence[Piece]:
        """The pieces that its prefix is to hold: what all its conversations have seen."""
        pieces = self.talks[0].pieces
        return pieces[: 2 * self.parts_at - 1] if self.parted else pieces

    def left(self, turns: int) -> int:
        """Conversations that are not done after so many turns."""
        if not self.parted:
            return self.size
        return sum(len(talk.turns) < turns for talk in self.talks)


@dataclasses.dataclass(eq=False)
class Talk:
    """A conversation under way.

    Attributes:
      pieces: token ids that the policy saw and wrote.
      turns: what came of its responses.
      draft: the beginning of its present response, where that was begun in an earlier rollout.
      resting: whether it waits for a later rollout to go on.
      row: its place; None while it waits for one.
      read: pieces that its row holds, and before them its group's prefix.
      held: slots of its row that hold something.
      written: behind them, tokens of the present response.
      heard: is given the tokens of the present response each time that our sampler has written
        some of them, but for the last.
    """

    group: Group
    uid: int
    pieces: list[Piece]
    turns: list[Turn]
    draft: Response | None = None
    resting: bool = False
    row: int | None = None
    read: int = 0
    held: int = 0
    written: int = 0
    heard: Callable[[Int[np.ndarray, " n"]], None] | None = None

    @property
    def turn(self) -> int:
        """The number of the turn that comes next, or is written; the first is 1."""
        return len(self.turns) + 1

    def limit(self, longest: int, budget: int = 0) -> int:
        """Tokens after which its response is cut, or rests where they are more than `budget`."""
        whole = min(self.group.limit or longest, longest)
        begun = 0 if self.draft is None else len(self.draft.ids)
        return min(whole, begun + budget) if budget else whole

    @property
    def unread(self) -> Sequence[Piece]:
        """Pieces that its row does not hold yet."""
        return self.pieces[self.read :]


def member_uid(uid: int, member: int) -> int:
    """The uid of a member of a group; all differ, also from the group's own."""
    return (uid * 65537 + member + 1) % 2**32


class Board:
    """Rows and prefixes of this host, and who has them.

    Args:
      rows, prefixes: of this host; `ways` divides both.
      members: most rows of a prefix.
    """

    def __init__(self, ways: int, rows: int, prefixes: int, members: int):
        self.ways, self.rows, self.prefixes, self.members = ways, rows, prefixes, members
        self.row_part, self.prefix_part = rows // ways, prefixes // ways
        self._free_rows = [
            list(range(way * self.row_part, (way + 1) * self.row_part))[::-1] for way in range(ways)
        ]
        self._free_prefixes = [
            list(range(way * self.prefix_part, (way + 1) * self.prefix_part))[::-1]
            for way in range(ways)
        ]
        self._seated: dict[int, Talk] = {}

    def way_of(self, group: Group) -> int:
        """The part that a group's prefix is in."""
        assert group.prefix is not None
        return group.prefix // self.prefix_part

    def admit(self, group: Group, most: Sequence[int]) -> bool:
        """Gives a group a prefix, in the part with the most free ones; False where there is none.

        Args:
          most: how many more groups each part can take now.
        """
        ways = [way for way in range(self.ways) if self._free_prefixes[way] and most[way] > 0]
        if not ways:
            return False
        way = max(ways, key=lambda way: (len(self._free_prefixes[way]), -way))
        group.prefix = self._free_prefixes[way].pop()
        return True

    def seat(self, talk: Talk) -> bool:
        """Gives a conversation a row beside its prefix; False where there is none."""
        free = self._free_rows[self.way_of(talk.group)]
        if not free:
            return False
        talk.row, talk.read, talk.held, talk.written = free.pop(), talk.group.read, 0, 0
        self._seated[talk.row] = talk
        return True

    def leave(self, talk: Talk) -> None:
        """Takes the row of a conversation back."""
        assert talk.row is not None
        del self._seated[talk.row]
        self._free_rows[talk.row // self.row_part].append(talk.row)
        talk.row = None

    def release(self, group: Group) -> None:
        """Takes the prefix of a group back."""
        assert group.prefix is not None
        self._free_prefixes[group.prefix // self.prefix_part].append(group.prefix)
        group.prefix, group.read, group.held = None, 0, 0

    @property
    def free_rows(self) -> int:
        """Rows that nobody has."""
        return sum(map(len, self._free_rows))

    def seats_for(self, talks: Iterable[Talk]) -> int:
        """How many of these conversations could be given a row."""
        wanted = collections.Counter(self.way_of(talk.group) for talk in talks)
        return sum(min(count, len(self._free_rows[way])) for way, count in wanted.items())

    @property
    def free_prefixes(self) -> int:
        """Prefixes that nobody has."""
        return sum(map(len, self._free_prefixes))

    def plan(self, starting: Iterable[Talk], longest: int, budget: int = 0) -> Plan[np.ndarray]:
        """Who is where, for a chunk of decoding.

        Args:
          longest: tokens that the sampler has room for in a response.
          budget: of them, how many may be written beyond its draft; 0: all.
        """
        rows, members = np.zeros(self.rows, np.int32), self.members
        plan = Plan(
            start=np.zeros(self.rows, bool),
            prefix=rows.copy(),
            members=np.full((self.prefixes, members), -1, np.int32),
            place=rows.copy(),
            uid=np.zeros(self.rows, np.uint32),
            turn=rows.copy(),
            limit=np.full(self.rows, longest, np.int32),
        )
        counts = np.zeros(self.prefixes, int)
        for row, talk in self._seated.items():
            prefix = talk.group.prefix
            assert prefix is not None
            local, own = prefix % self.prefix_part, counts[prefix]
            plan.prefix[row], plan.uid[row], plan.turn[row] = local, talk.uid, talk.turn
            plan.place[row] = local * members + own
            plan.limit[row] = talk.limit(longest, budget)
            plan.members[prefix, own] = row % self.row_part
            counts[prefix] += 1
        for talk in starting:
            plan.start[talk.row] = True
        return plan
