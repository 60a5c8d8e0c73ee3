"""The programs of a stage, lowered on this machine's device; what would run them is no matter."""

import jax
import pytest

from mmrecoder_jax.config import ConfigError, load, set_fields
from mmrecoder_jax.models.trees import split
from mmrecoder_jax.planner.fits import arguments_of, held
from mmrecoder_jax.planner.programs import Program, Programs, model_flops, programs_of


def programs(stage, **fields):
    config = load(stage, "smoke")
    set_fields(config, {name.replace("__", "."): value for name, value in fields.items()})
    return Programs(config, jax.devices()[:1])


def test_a_supervised_stage_has_no_rollout():
    assert programs_of("stage1") == tuple(Program)
    assert programs_of("sft_chart2code") == (Program.GRADIENTS, Program.UPDATE)


def test_flops_of_a_model_by_hand():
    """One update of the tiny preset counted in another way: weights times two, three passes."""
    found = programs("stage2")
    sizes = {
        "/".join(k.key for k in path): x.size
        for path, x in jax.tree_util.tree_leaves_with_path(found.params)
    }
    kernels = {name: n for name, n in sizes.items() if name.endswith("kernel")}
    text = sum(n for name, n in kernels.items() if "model/layers" in name)
    text += sizes["model/embed_tokens/weight"]
    merger = sum(n for name, n in kernels.items() if "merger" in name)
    vision = sum(n for name, n in kernels.items() if name.startswith("visual")) - merger
    c, v = found.sizes, found.sizes.vision
    shape, patches = found.shape, found.windows * v.window_patches
    # prompts of two groups, and of eight rows two answers and a feedback
    assert found.tokens == 2 * 40 + 8 * (2 * 32 + 80)
    tokens = found.tokens * 2 * text + shape.rows * 264 * c.num_layers * 4 * 128 * 264 / 2
    attended = 4 * 96 * (patches + v.window_patches)
    images = shape.images * patches * (2 * vision + 2 * merger / 4 + attended)
    assert found.micro_batches == 2
    assert model_flops(found, Program.GRADIENTS) == pytest.approx(3 * (tokens + images), rel=1e-6)
    assert model_flops(found, Program.UPDATE) == 0  # the optimizer's step alone


def test_rows_and_lengths_of_stage_1_and_2():
    stage1, stage2 = programs("stage1"), programs("stage2")
    calls = {
        Program.PREFILL: (4, 4, 40),
        Program.EXTEND: (4, 8, 80),  # stage 1: a group's feedback, once; stage 2: 8 rows at a time
        Program.DECODE: (16, 16, 1),
    }
    for program, (first, second, length) in calls.items():
        assert (stage1.rows(program), stage2.rows(program)) == (first, second)
        assert stage1.length(program) == stage2.length(program) == length
    state = stage1.sampler_state()
    assert len(state.prefix) == len(state.own) == 3
    assert state.prefix[0]["k"].shape == (4, 2, 40 + 32 + 80, 32)  # prompt, turn 1 and its feedback
    assert state.own[0]["k"].shape == (16, 2, 32, 32)
    assert stage2.sampler_state().prefix[0]["k"].shape == (4, 2, 40, 32)
    assert stage2.sampler_state().own[0]["k"].shape == (16, 2, 32 + 80 + 32, 32)
    assert programs("stage1", rl__rollout_prompts=2).rows(Program.DECODE) == 8


def test_few_rows_read_again_what_they_held():
    """Where rows are given away between turns, one call reads a response and its feedback."""
    few = programs("stage2", rl__rows=8, rl__turns=3)
    assert few.reads_again and few.length(Program.EXTEND) == 3 * 32 + 2 * 80
    assert few.prompts(Program.EXTEND)["patches"].shape[0] == 2 * few.rows(Program.EXTEND)
    assert few.prompts(Program.PREFILL)["patches"].shape[0] == few.rows(Program.PREFILL)
    assert not programs("stage2").reads_again and not programs("stage1", rl__rows=8).reads_again


def test_what_is_held_where_rollouts_are_ahead_of_updates():
    now, ahead = programs("stage2"), programs("stage2", rl__ahead=1)
    policy = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(now.params))
    for program in (Program.DECODE, Program.GRADIENTS):
        without, beside = held(now, program), held(ahead, program)
        assert without["ahead"] == 0
        rollout = held(now, Program.DECODE) if program == Program.GRADIENTS else {}
        more = policy + rollout.get("cache", 0) + rollout.get("weights", 0)
        assert beside["ahead"] == beside["resident"] - without["resident"] == more
        assert {**beside, "ahead": 0, "resident": without["resident"]} == without


@pytest.mark.parametrize("frozen", [False, True])
def test_a_reference_is_held_beside_every_program(frozen):
    fields = {"model__freeze_vision": frozen}
    alone, with_one = programs("stage2", **fields), programs("stage2", rl__kl_coef=0.1, **fields)
    moving, _ = split(alone.params, alone.trained)
    copied = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(moving))
    for program in Program:
        without, beside = held(alone, program), held(with_one, program)
        assert without["reference"] == 0 and beside["reference"] == copied > 0
        assert beside["resident"] == without["resident"] + copied
        assert arguments_of(beside) == arguments_of(without)  # no program reads it


def test_the_programs_are_those_of_the_trainer():
    found = programs("stage1")
    assert "while" in found.lower(Program.DECODE).as_text()
    for program in Program:
        assert found.lower(program).out_info


def test_what_a_program_reads_of_the_tower():
    name = "visual/merger/ln_q/weight"
    trained = programs("stage1")
    read = [program for program in Program if trained.reads(program, name)]
    assert read == [Program.PREFILL, Program.EXTEND, Program.GRADIENTS, Program.UPDATE]
    frozen = programs("stage1", model__freeze_vision=True)
    assert not any(frozen.reads(program, name) for program in Program)
    assert frozen.micro_batch()["features"].shape == (4, 48, 128)
    assert model_flops(frozen, Program.PREFILL) < model_flops(trained, Program.PREFILL)


def test_a_feedback_of_two_pictures_takes_two_places():
    one, two = programs("stage2"), programs("stage2", feedback__image="both")
    for program, more in ((Program.PREFILL, 1), (Program.EXTEND, 2)):
        patches = (found.prompts(program)["patches"].shape[0] for found in (one, two))
        assert [*patches] == [one.rows(program), more * one.rows(program)]
    assert model_flops(one, Program.EXTEND) < model_flops(two, Program.EXTEND)
    assert model_flops(one, Program.PREFILL) == model_flops(two, Program.PREFILL)
    supervised = programs("sft_self_correction", feedback__image="both").shape
    assert supervised.images == 3 * supervised.rows


@pytest.mark.parametrize("stage, images", [("sft_chart2code", 1), ("sft_self_correction", 2)])
def test_a_supervised_stage_lowers_its_update(stage, images):
    found = programs(stage)
    assert found.shape.images == images * found.shape.rows
    assert found.lower(Program.UPDATE).out_info


class Device:
    """A device of a slice that this machine does not have."""

    def __init__(self, process_index):
        self.process_index = process_index


def test_rows_that_devices_cannot_share_are_named(monkeypatch):
    monkeypatch.setattr(Programs, "ways", 3)
    with pytest.raises(ConfigError, match=r"train.micro_batch_size=8 rows cannot be split over"):
        programs("stage1")
    with pytest.raises(ConfigError, match=r"rl.rollout_prompts=2 rows.*--config.mesh.tensor"):
        programs("stage1", train__micro_batch_size=9, rl__rollout_prompts=2)
