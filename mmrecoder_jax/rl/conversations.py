"""Which conversation is in which row of the sampler, and which group has which prefix.

    waiting -> a prefix, filled -> members, each: a row, turn, feedback, turn, ... -> done
               shared turns: one row, turn, promoted; feedback behind the prefix

A group keeps its prefix until its last conversation is done; a conversation keeps its row from its
first turn to its last. Rows and prefixes are cut into `ways` parts, one per device of this host
that shares rows; a group's rows are in the part of its prefix. Plain bookkeeping: nothing here
computes.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from mmrecoder_jax.data.batching import Piece
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.rl.sampler import Plan
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
      talks: the G conversations, once they have parted.
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
    held: int = 0
    limit: int = 0

    def begin(self) -> list["Talk"]:
        """The first conversations: G that part at once, or the one they have in common."""
        trunk = Talk(self, self.uid, [self.prompt], [])
        return self.part(trunk) if self.parts_at == 1 else [trunk]

    def part(self, trunk: "Talk") -> list["Talk"]:
        """G conversations with the same past, each with its own random numbers."""
        alone = self.size == 1
        self.talks = [
            Talk(
                self,
                self.uid if alone else member_uid(self.uid, member),
                list(trunk.pieces),
                list(trunk.turns),
            )
            for member in range(self.size)
        ]
        return self.talks

    @property
    def parted(self) -> bool:
        return bool(self.talks)


@dataclasses.dataclass(eq=False)
class Talk:
    """A conversation under way.

    Attributes:
      pieces: token ids that the policy saw and wrote.
      turns: what came of its responses.
      row: its place; None while it waits for one.
      held: slots of its row that hold something.
      written: of them, tokens of the present response.
    """

    group: Group
    uid: int
    pieces: list[Piece]
    turns: list[Turn]
    row: int | None = None
    held: int = 0
    written: int = 0

    @property
    def turn(self) -> int:
        """The number of the turn that comes next, or is written; the first is 1."""
        return len(self.turns) + 1


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
        talk.row, talk.held, talk.written = free.pop(), 0, 0
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
        group.prefix = None

    @property
    def free_rows(self) -> int:
        """Rows that nobody has."""
        return sum(map(len, self._free_rows))

    @property
    def free_prefixes(self) -> int:
        """Prefixes that nobody has."""
        return sum(map(len, self._free_prefixes))

    def plan(self, starting: Iterable[Talk], longest: int) -> Plan[np.ndarray]:
        """Who is where, for a chunk of decoding.

        Args:
          longest: tokens that the sampler has room for in a response.
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
            plan.limit[row] = min(talk.group.limit or longest, longest)
            plan.members[prefix, own] = row % self.row_part
            counts[prefix] += 1
        for talk in starting:
            plan.start[talk.row] = True
        return plan
