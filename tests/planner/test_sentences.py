"""What a plan says, in words that a user can act on."""

import dataclasses

import pytest

from mmrecoder_jax.config import load
from mmrecoder_jax.planner import topology
from mmrecoder_jax.planner.advice import Settled
from mmrecoder_jax.planner.fits import COUNTED, GIB
from mmrecoder_jax.planner.programs import Program
from mmrecoder_jax.planner.sentences import sentences, told
from tests.planner.test_fits import report

V5E = topology.parse("v5e-16")


def settled(*, fields=None, wanted=None, **changes):
    config = load("stage2", "paper")
    config.update_from_flattened_dict(fields or {})
    reports = tuple(report(program=program, weights=GIB, **changes) for program in Program)
    return Settled(fields or {}, config, reports, reports)


def text(*found, wanted=V5E, price=None):
    return "\n".join(sentences(found, wanted, price))


def test_what_fits_is_said_with_its_time_and_its_price():
    found = text(settled())
    assert "stage2 of the 7b fits v5e-16 (16 chips) as configured" in found
    assert "takes 12.0 of 15.8 GiB" in found
    assert "low effort, which leaves 3.8 GiB or more" in found and "--effort=default" in found
    assert "A step takes" in found and "decoding" in found and "Assumed:" in found
    assert "100 steps take" in found and "at 1.20 an hour and chip (the list's price)" in found
    assert "at 9.00 an hour and chip (your price)" in text(settled(), price=9.0)


def test_what_was_compiled_at_the_default_needs_no_caveat():
    assert "low effort" not in text(settled(effort="default"))


def test_flags_are_those_that_make_it_fit():
    fields = {"mesh.tensor": 2, "train.micro_batch_size": 8}
    found = text(settled(fields=fields))
    assert "with --config.mesh.tensor=2 --config.train.micro_batch_size=8" in found


def test_what_does_not_fit_is_followed_by_what_does():
    adapters = {"lora.rank": 16, "model.param_dtype": "bfloat16"}
    found = text(settled(peak=17 * GIB), settled(fields=adapters)).splitlines()
    assert "does not fit v5e-16 (16 chips), however it is cut" in found[0]
    assert "needs at least 17.0 of 15.8 GiB" in found[0]
    assert found[1].startswith("stage2 of the 7b with adapters of rank 16 fits")
    assert "--config.lora.rank=16" in found[1]


def test_where_nothing_fits_the_next_size_is_named_and_no_time_is_told():
    found = text(settled(peak=31 * GIB, effort=COUNTED))
    assert "needs at least 31.0 of 15.8 GiB to begin with" in found
    assert "take a slice with 2.0 times the memory" in found
    assert "mesh.tensor" not in found and "A step" not in found


def test_gpus_were_counted_and_want_their_memory():
    found = text(settled(hbm=70 * GIB, effort=COUNTED), wanted=topology.parse("h100:8"))
    assert "h100:8 (8 GPUs)" in found and "Nothing was compiled" in found
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in found and "an hour and GPU" in found


def test_no_price_is_made_up():
    found = text(settled(), wanted=topology.parse("tpu7x-8"))
    assert "(4 chips, 8 devices)" in found and "give --price=USD" in found
    assert "USD at" not in found and "unit" not in found


def test_several_slices_are_said_to_be_on_paper():
    found = text(settled(), wanted=topology.parse("4xv5e-16"))
    assert "4 slices of 16 chips" in found and "on paper" in found
    parts = settled(fields={"train.micro_batch_size": 8, "mesh.tensor": 2})
    flags = text(parts, wanted=topology.parse("4xv5e-16"))
    assert "--config.train.micro_batch_size=32 --config.mesh.tensor=2" in flags


@pytest.mark.parametrize("steps, words", [(0, "100 steps take"), (2500, "2,500 steps take")])
def test_a_run_is_as_long_as_its_configuration_says(steps, words):
    assert words in text(settled(fields={"train.steps": steps}))


def test_the_tables_stand_below():
    one = settled()
    found = told([one, dataclasses.replace(one, fields={})], V5E, None)
    assert found.index("fits v5e-16") < found.index("GiB on one device of v5e-16")
    assert found.count("  gradients: all-gather 3 GiB") == 1  # the same report stands once
