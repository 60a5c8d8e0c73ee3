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
      %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]) collective-permute-start(%x), channel_id=2
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
      %r = (f32[10]{0}, f32[2,3]{1,0}) all-reduce(%s, %t), replica_groups={{0,1},{2,3}}
      %m = f32[6]{0} reduce-scatter(%u), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
      ROOT %z = f32[8]{0} all-to-all(%m), dimensions={0}
    }
    """
)


LESS_THAN = "%lt = pred[] compare(%i, %c), direction=LT"


def test_loops_multiply_and_every_kind_is_counted_as_received():
    found = hlo.collectives(LOOP.replace("CONDITION", LESS_THAN))
    assert found.bytes == {
        "all-gather": 5 * (16 * 8 * 2) * 3 // 4,
        "all-reduce": 2 * (10 + 6) * 4 // 2,
        "reduce-scatter": 6 * 4 * 3,
        "all-to-all": 8 * 4 * 7 // 8,
        "collective-permute": (5 * 3) * (4 * 8 * 2),
    }
    assert not found.dynamic


def test_a_known_trip_count_goes_before_the_condition():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    text = LOOP.replace("CONDITION", LESS_THAN).replace("body=%body", known)
    assert hlo.collectives(text).bytes["all-gather"] == 7 * (16 * 8 * 2) * 3 // 4


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    found = hlo.collectives(LOOP.replace("CONDITION", "%both = pred[] and(%lt, %more)"))
    assert found.dynamic
    assert found.bytes["all-gather"] == (16 * 8 * 2) * 3 // 4
    assert found.bytes["collective-permute"] == 3 * (4 * 8 * 2)


def test_a_program_of_this_machine_has_none():
    everywhere = NamedSharding(make_mesh(devices=jax.devices()[:1]), PartitionSpec())
    product = jax.jit(lambda x: x @ x, out_shardings=everywhere)
    text = product.lower(jax.numpy.ones((4, 4))).compile().as_text()
    assert hlo.collectives(text).bytes == {}


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[4,2]<=[8]", 2),
        ("mesh['axis_0'=1,'axis_1'=5] {'axis_0','axis_1'}", 5),
        ("{}", 7),  # all devices
    ],
)
def test_group_sizes(groups, size):
    text = textwrap.dedent(
        f"""
        HloModule jit_f, num_partitions=7

        ENTRY %main (p: u8[8]) -> u8[8] {{
          ROOT %m = u8[8]{{0}} reduce-scatter(%p), replica_groups={groups}, dimensions={{0}}
        }}
        """
    )
    assert hlo.collectives(text).bytes == {"reduce-scatter": 8 * (size - 1)}
