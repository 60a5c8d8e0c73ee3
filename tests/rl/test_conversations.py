"""Places: nobody has a row twice, groups stay in their part, and plans say who is where."""

import numpy as np

from mmrecoder_jax.data.batching import Piece
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env import Record
from mmrecoder_jax.rl.conversations import Board, Group, member_uid
from mmrecoder_jax.rl.schedule import Size, conversation_slots

CHART = Chart("a", b"", "", Record((), (), {}, ()), "", "", "")


def group(uid, size=2, parts_at=1):
    return Group(CHART, uid, size, parts_at, Piece(np.arange(3, dtype=np.int32), 0))


def seated(board, groups):
    talks = []
    for one in groups:
        assert board.admit(one, [9] * board.ways)
        one.begin()
        talks += one.talks
    return [talk for talk in talks if board.seat(talk)]


def test_groups_are_spread_over_parts_and_their_rows_stay_with_them():
    board = Board(ways=2, rows=8, prefixes=4, members=2)
    groups = [group(uid) for uid in range(4)]
    talks = seated(board, groups)
    assert [board.way_of(one) for one in groups] == [0, 1, 0, 1]
    assert len({talk.row for talk in talks}) == 8 and board.free_rows == 0
    assert all(talk.row // 4 == board.way_of(talk.group) for talk in talks)
    assert not board.admit(group(9), [9, 9])
    board.leave(talks[0])
    assert talks[0].row is None and board.free_rows == 1
    board.release(groups[0])
    assert board.admit(group(9), [9, 9]) and not board.admit(group(10), [9, 9])


def test_a_part_takes_no_more_groups_than_it_is_told():
    board = Board(ways=2, rows=4, prefixes=4, members=1)
    assert board.admit(one := group(1), [0, 1]) and board.way_of(one) == 1
    assert not board.admit(group(2), [0, 0])


def test_a_plan_says_who_is_where():
    board = Board(ways=2, rows=6, prefixes=2, members=2)
    groups = [group(5), group(6)]
    talks = seated(board, groups)
    board.leave(talks[0])
    groups[1].limit = 7
    plan = board.plan(talks[3:], 9)
    for talk in talks[1:]:
        prefix, row = talk.group.prefix, talk.row
        assert plan.prefix[row] == prefix % 1 and plan.uid[row] == talk.uid and plan.turn[row] == 1
        flat = plan.members.reshape(2, -1)[prefix]  # a part's prefixes: one
        assert flat[plan.place[row]] == row % 3
        assert plan.start[row] == (talk is talks[3])
        assert plan.limit[row] == (7 if talk.group is groups[1] else 9)
    assert (plan.members[talks[0].group.prefix] >= 0).sum() == 1


def test_uids_of_members_differ_and_a_chart_alone_keeps_its_own():
    both = group(5), group(6)
    for one in both:
        one.begin()
    uids = [talk.uid for one in both for talk in one.talks]
    assert len({5, 6, *uids}) == 6
    assert uids == [member_uid(5, 0), member_uid(5, 1), member_uid(6, 0), member_uid(6, 1)]
    alone = group(5, size=1)
    alone.begin()
    assert [talk.uid for talk in alone.talks] == [5]


def test_a_shared_turn_is_written_once():
    one = group(5, parts_at=2)
    one.begin()
    (trunk,) = one.talks
    assert trunk.uid == 5 and not one.parted and one.left(2) == 2
    for turn in (1, 0):
        trunk.pieces.append(Piece(np.arange(2, dtype=np.int32), turn))
    assert len(one.common) == 3
    one.part()
    members = one.talks
    assert one.parted and [len(talk.pieces) for talk in members] == [3, 3]
    members[0].pieces.append(Piece(np.arange(2, dtype=np.int32), 2))
    assert len(one.common) == 3 and one.left(2) == 2
    assert members[0].pieces is not members[1].pieces


def test_sizes():
    assert Size().places(prompts=6, group=4, ways=2, hosts=1) == (6, 24)
    assert Size().places(prompts=5, group=3, ways=2, hosts=1) == (6, 18)
    assert Size(prompts=4, rows=10).places(prompts=6, group=4, ways=2, hosts=2) == (2, 6)
    assert conversation_slots(40, 80, 72, turns=3, parts_at=2) == (192, 224)
