"""Numbers counted from shapes, beside sums by hand and beside what a card was measured to take."""

import jax
import pytest

from mmrecoder_jax.config import load
from mmrecoder_jax.planner import counted, fits, topology
from mmrecoder_jax.planner.fits import GIB
from mmrecoder_jax.planner.programs import Program, Programs


def of_3b(**fields):
    config = load("stage2", "paper")
    config.model.preset, config.data.lengths, config.data.windows = "3b", (2048,), (21,)
    config.train.batch_size, config.train.micro_batch_size = 1, 8
    for name, value in fields.items():
        config.model[name] = value
    return Programs(config, jax.devices()[:1])


def test_a_recomputed_layer_keeps_its_input_and_works_in_its_values():
    programs = of_3b(param_dtype="bfloat16", freeze_vision=True)
    c = programs.sizes
    tokens = programs.tokens
    width = 4 * 2048 + 2 * 11008 + (16 + 2 * 2) * 128
    gradients = counted.chosen_bytes(programs, programs.trained)
    loss = 3 * 2048 * 151936 * 4
    by_hand = (36 * 2048 + 2 * width) * tokens * 2 + loss + gradients
    assert counted.temporaries(programs, Program.UPDATE) == by_hand
    kept = of_3b(param_dtype="bfloat16", freeze_vision=True, remat="none")
    more = 36 * (width - c.hidden_size) * tokens * 2
    assert counted.temporaries(kept, Program.UPDATE) == by_hand + more


def test_one_device_receives_nothing():
    programs = of_3b()
    assert all(counted.received(programs, program) == {} for program in Program)


def test_the_memory_of_a_measured_update():
    """An H100 took 59.9 GiB for 8 rows of 2,048 tokens with 8 images and float32 weights."""
    found = fits.measure(of_3b(), Program.UPDATE, topology.parse("h100:1"), "low")
    assert found.effort == fits.COUNTED and found.fits
    assert found.used / GIB == pytest.approx(59.9, rel=0.12)
