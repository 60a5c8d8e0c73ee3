"""Collectives of hand-made program texts."""

import textwrap

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.planner import hlo

LOOP = textwrap.dedent(
    """
    HloModule jit_f, is_scheduled=true, num_partitions=8

    %add (a: f32[], b: f32[]) -> f32[] {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %sum = f32[] add(%a, %b)
    }

    %inner_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
      %p = (s32[], bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
      %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
      %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1},{1,0}}
      %y = bf16[4,8]{1,0} collective-permute-done(%start)
      ROOT %r = (s32[], bf16[4,8]) tuple(%i, %y)
    }

    %inner_cond (p: (s32[], bf16[4,8])) -> pred[] {
      %c = s32[]{:T(128)} constant(3), metadata={op_name="x"}
      %p = (s32[], bf16[4,8]) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      ROOT %lt = pred[] compare(%i, %c), direction=LT
    }

    %body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
      %p = (s32[], bf16[4,8]) parameter(0)
      %g = bf16[16,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
      ROOT %w = (s32[], bf16[4,8]) while(%p), condition=%inner_cond, body=%inner_body
    }

    %cond (p: (s32[], bf16[4,8])) -> pred[] {
      %c = s32[] constant(5)
      %p = (s32[], bf16[4,8]) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      ROOT CONDITION
    }

    ENTRY %main (p: bf16[4,8]) -> f32[] {
      %w = (s32[], bf16[4,8]) while(%t), condition=%cond, body=%body
      %r = (f32[10]{0}, f32[2,3]{1,0}) all-reduce(%s, %t), replica_groups={{0,1},{2,3}}, to_apply=%add
      %m = f32[6]{0} reduce-scatter(%u), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
      ROOT %z = f32[8]{0} all-to-all(%m), dimensions={0}
    }
    """
)


def test_loops_multiply_and_every_kind_is_counted_as_received():
    found = hlo.collectives(LOOP.replace("CONDITION", "%lt = pred[] compare(%i, %c), direction=LT"))
    assert found.counts == {
        "all-gather": 5,
        "all-reduce": 1,
        "reduce-scatter": 1,
        "all-to-all": 1,
        "collective-permute": 15,
    }
    assert found.bytes == {
        "all-gather": 5 * 16 * 8 * 2 * 3 // 4,
        "all-reduce": 2 * (10 + 6) * 4 // 2,
        "reduce-scatter": 6 * 4 * 3,
        "all-to-all": 8 * 4 * 7 // 8,
        "collective-permute": 15 * 4 * 8 * 2,
    }
    assert not found.dynamic and found.total == sum(found.bytes.values())


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    found = hlo.collectives(LOOP.replace("CONDITION", "%both = pred[] and(%lt, %more)"))
    assert (
        found.dynamic
        and found.counts["all-gather"] == 1
        and found.counts["collective-permute"] == 3
    )


def test_a_program_of_this_machine_has_none():
    mesh = make_mesh(devices=jax.devices()[:1])
    text = (
        jax.jit(lambda x: x @ x, out_shardings=NamedSharding(mesh, PartitionSpec()))
        .lower(jax.numpy.ones((4, 4)))
        .compile()
        .as_text()
    )
    assert hlo.collectives(text).total == 0


@pytest.mark.parametrize(
    "rest, size",
    [
        ("x), replica_groups={{0,1,2},{3,4,5}}, y", 3),
        ("x), replica_groups=[16,1]<=[16]", 1),
        ("x), replica_groups=mesh['axis_0'=1,'axis_1'=16] {'axis_0','axis_1'}, z", 16),
        ("x), replica_groups={}", 7),
    ],
)
def test_group_sizes(rest, size):
    assert hlo._group_size(rest, 7) == size
