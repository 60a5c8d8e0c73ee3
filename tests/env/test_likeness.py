"""What is compared of two machines, and how a difference is said."""

import dataclasses

from mmrecoder_jax.env import EnvConfig, interpreter
from mmrecoder_jax.env.likeness import BUBBLEWRAP, differences, likeness


def test_facts_of_this_machine():
    python = interpreter.find("")
    facts = likeness(EnvConfig(), python)
    assert facts["matplotlib"] == python.releases["matplotlib"]
    assert python.version.startswith(facts["Python"] + ".") and facts["sandbox"] == "auto"
    assert facts == likeness(EnvConfig(), python)
    unsafe = likeness(EnvConfig(sandbox="unsafe"), python)
    assert (unsafe["sandbox"], unsafe[BUBBLEWRAP]) == ("unsafe", "not used")
    assert likeness(EnvConfig(bubblewrap=False), python)[BUBBLEWRAP] == "not used"
    older = dataclasses.replace(python, releases={**python.releases, "matplotlib": "3.8.4"})
    assert differences(likeness(EnvConfig(), older), facts) == [
        f"matplotlib is 3.8.4 there and {facts['matplotlib']} here"
    ]


def test_differences_name_both_sides():
    assert differences({"a": "1"}, {"a": "1"}) == []
    assert differences({"a": "1", "b": "2"}, {"a": "2", "c": "3"}) == [
        "a is 1 there and 2 here",
        "c is missing there",
        "b is missing here",
    ]
