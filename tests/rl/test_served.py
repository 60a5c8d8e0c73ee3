"""Rollouts on a server that decodes the same policy through `transformers`: what it writes is what
our sampler would write, whatever goes wrong ends in one line, and the policy reaches it.
"""

import dataclasses
import json
import socket
import threading
import time

import jax
import numpy as np
import pytest

from mmrecoder_jax.command import explain
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.batching import BatchShape, Collate, TokenRow
from mmrecoder_jax.data.pipeline import learner_batch
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.processor import pixels_of, window_patches
from mmrecoder_jax.models.published import load_config
from mmrecoder_jax.rl.sampler import SamplerSpec
from mmrecoder_jax.rl.schedule import Run
from mmrecoder_jax.rl.served.dialects import (
    Picture,
    Question,
    Sglang,
    Vllm,
    Written,
    checked,
    parsed,
)
from mmrecoder_jax.rl.served.make import make_rollouts
from mmrecoder_jax.rl.served.run import ServedRollouts, seed_of
from mmrecoder_jax.rl.trajectory import Mode
from mmrecoder_jax.rl.web import BadAnswer, ServerDown
from tests.rl.test_rollout import ScriptedEnv

GROUP = 2
RESPONSE = {"rl.response_length": 8, "rl.decode_chunk": 4}


@pytest.fixture(scope="module")
def server():
    from tests.rl.token_server import TokenServer

    with TokenServer() as server:
        yield server


@pytest.fixture(autouse=True)
def unharmed(request):
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        server.fault, server.spoil = lambda number, path: None, lambda answer: answer
        server.requests.clear()
        server.headers.clear()
    if "sampled" in request.fixturenames:  # another test may have had other weights loaded
        for engine in request.getfixturevalue("sampled").values():
            engine.rollouts._loaded = []


@pytest.fixture(scope="module")
def stages(policy, server, tmp_path_factory):
    """`stages(kind, **fields of engine)`: a stage whose rollouts a server decodes."""

    def make(kind, **fields):
        engine = {"kind": kind, "url": server.url, "retries": 2, "timeout_seconds": 20.0} | fields
        fields = RESPONSE | {f"engine.{name}": value for name, value in engine.items()}
        return policy.stage_with(fields, workdir=str(tmp_path_factory.mktemp("served")))

    return make


def patient(engine, **changes):
    """Shorter pauses between attempts."""
    rollouts = engine.rollouts
    rollouts.address = dataclasses.replace(rollouts.address, **({"pause_seconds": 0.01} | changes))
    return engine


@pytest.fixture(scope="module")
def sampled(stages):
    return {kind: patient(stages(kind).engine(ScriptedEnv(), 1.0)) for kind in ("sglang", "vllm")}


@pytest.fixture(scope="module")
def greedy(stages):
    return patient(stages("sglang").engine(ScriptedEnv(), 0.0))


def roll(engine, policy, mode=Mode.FULL_TRAJECTORY, params=None, charts=2, group=GROUP, turns=2):
    engine.env.asked = 0
    return engine.rollout(
        policy.params if params is None else params,
        policy.charts[:charts],
        [3, 4][:charts],
        jax.random.key(7),
        mode=mode,
        group=group,
        turns=turns,
    )


def gap(stage, policy, groups, params=None):
    """Log-probabilities of the learner less those that came with the tokens, per token."""
    trajectories = [t for group in groups for t in group]
    rows = [TokenRow(t.pieces, (1, 2)) for t in trajectories]
    batch = learner_batch(rows, Collate(BatchShape(len(rows), (264,), (6, 12), 16), stage.layout))
    with jax.set_mesh(stage.mesh):
        micro = jax.tree.map(lambda x: x[0], distributed.to_global(batch, stage.mesh, axis=1))
        params = policy.params if params is None else params
        logps = np.asarray(jax.jit(stage.token_logps())(params, micro)[0])
    ours = [row[weights > 0] for row, weights in zip(logps, batch["weights"][0], strict=True)]
    theirs = [np.concatenate([turn.logps for turn in t.turns]) for t in trajectories]
    return np.concatenate(ours) - np.concatenate(theirs)


# ---------------------------------------------------------------- what it writes


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
@pytest.mark.parametrize("mode", Mode)
def test_a_servers_tokens_have_the_learners_probabilities(sampled, policy, server, kind, mode):
    engine = sampled[kind]
    groups = roll(engine, policy, mode)
    assert [len(group) for group in groups] == [GROUP, GROUP]
    for first, second in groups:
        shared = np.array_equal(first.turns[0].ids, second.turns[0].ids)
        assert shared == (mode is Mode.SHARED_FIRST_TURN)
        assert not np.array_equal(first.turns[1].ids, second.turns[1].ids)
        assert [piece.turn for piece in first.pieces] == [0, 1, 0, 2]
    assert len(server.questions()) == (6 if mode is Mode.SHARED_FIRST_TURN else 8)
    assert np.abs(gap(policy.stage, policy, groups)).max() < 1e-3
    written = sum(len(turn.ids) for group in groups for t in group for turn in t.turns)
    if mode is Mode.FULL_TRAJECTORY:
        assert engine.stats.tokens == written


def test_the_same_seeds_give_the_same_tokens(sampled, policy):
    first, again = (roll(sampled["sglang"], policy) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x.turns[0].ids, y.turns[0].ids)
    seeds = {seed_of((0, 7), turn, uid) for turn in (1, 2) for uid in range(50)}
    assert len(seeds) == 100 and all(0 <= seed < 2**31 for seed in seeds)


def test_the_most_probable_ids_are_those_of_our_sampler(greedy, policy):
    ours = policy.stage_with(RESPONSE).engine(ScriptedEnv(), 0.0)
    assert ours.rollouts is Run and isinstance(greedy.rollouts, ServedRollouts)
    expected, found = roll(ours, policy, group=1), roll(greedy, policy, group=1)
    for (a,), (b,) in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a.turns[0].ids, b.turns[0].ids)
        np.testing.assert_allclose(a.turns[0].logps, b.turns[0].logps, atol=2e-4)
        assert a.turns[0].finished == b.turns[0].finished


def test_many_are_asked_at_one_time_and_no_more(stages, policy, server):
    engine = patient(stages("sglang", in_flight=3).engine(ScriptedEnv(), 1.0))
    server.most_at_once = 0
    roll(engine, policy, turns=1)
    assert server.most_at_once == 3


def test_features_of_a_frozen_tower_are_there_for_the_learner(policy, server, stages):
    stage = stages("sglang")
    stage.config.model.freeze_vision = True
    engine = patient(stage.engine(ScriptedEnv(), 1.0))
    groups = roll(engine, policy, charts=1)
    images = [image for t in groups[0] for piece in t.pieces for image in piece.images]
    assert images and "features" in engine.image_arrays(images, len(images), 6, engine.layout)


def test_pictures_travel_as_the_policy_sees_them(policy):
    processor = policy.stage.processor
    image = processor.image(policy.charts[0].image)
    again = processor.image(pixels_of(image, processor.vision))
    np.testing.assert_array_equal(again.patches, image.patches)
    pixels = np.random.default_rng(0).integers(0, 256, (84, 140, 3), np.uint8)
    patches = window_patches(pixels, processor.vision)
    np.testing.assert_array_equal(pixels_of(patches, processor.vision), pixels)


# ---------------------------------------------------------------- the policy


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_a_changed_policy_is_loaded_and_one_that_is_not_is_not(stages, policy, server, kind):
    stage = stages(kind)
    engine = patient(stage.engine(ScriptedEnv(), 1.0))
    loaded = len(server.loaded)
    for _ in range(2):
        roll(engine, policy, charts=1)
        assert len(server.loaded) == loaded + 1
    changed = jax.tree.map(lambda x: x, policy.params)
    table = changed["model"]["embed_tokens"]
    changed["model"]["embed_tokens"] = {"weight": table["weight"] * 2}
    second = roll(engine, policy, params=changed, charts=1)
    assert np.abs(gap(policy.stage, policy, second, changed)).max() < 1e-3
    assert np.abs(gap(policy.stage, policy, second)).max() > 1e-2
    names = [path.rsplit("/", 1)[1] for path in server.loaded[-2:]]
    assert names == ["policy-000001", "policy-000002"]
    pictures = [
        question.get("mm_hashes") or [part["uuid"] for part in question["content_parts"]]
        for question in server.questions()
    ]
    assert pictures[0][0] != pictures[-1][0], "features of the old weights would be used again"


def test_two_policies_stay_on_disk(stages, policy, server, tmp_path):
    files = stages("sglang").engine(ScriptedEnv(), 1.0).rollouts.files
    (files._directory / "policy-000009.tmp").mkdir(parents=True)  # of a run that was killed
    for number in (1, 2, 3):
        path = files.write(policy.params)
        files.forget_old()
        assert path.name == f"policy-{number:06d}"
    assert sorted(p.name for p in path.parent.iterdir()) == ["policy-000002", "policy-000003"]
    assert load_config(path).hidden_size == policy.stage.model.config.hidden_size


def test_a_policy_that_cannot_be_loaded_ends_the_run(stages, policy, server):
    engine = patient(stages("sglang").engine(ScriptedEnv(), 1.0))
    no = json.dumps({"success": False, "message": "no room"}).encode()
    server.fault = lambda number, path: (200, {}, no, 0.0)
    with pytest.raises(ServerDown, match=r"was not confirmed.*no room.*3 attempts"):
        roll(engine, policy, charts=1)
    server.fault = lambda number, path: (400, {}, b"bad path", 0.0)
    with pytest.raises(ServerDown, match="HTTP 400: bad path"):
        roll(engine, policy, charts=1)
    server.fault = lambda number, path: None
    roll(engine, policy, charts=1, turns=1)  # it is tried again


# ---------------------------------------------------------------- what goes wrong


def spoiled(**fields):
    """An answer of which some fields are others; a function takes what was there."""

    def spoil(answer):
        if "meta_info" not in answer:
            return answer
        meta = answer["meta_info"]
        for name, value in fields.items():
            place = answer if name in answer else meta
            place[name] = value(place[name]) if callable(value) else value
        return answer

    return spoil


def tokens(change):
    """The answer with other (log-probability, id) pairs."""

    def spoil(answer):
        if "meta_info" in answer:
            triples = change([t[:2] for t in answer["meta_info"]["output_token_logprobs"]])
            answer["meta_info"]["output_token_logprobs"] = [[*t, None] for t in triples]
            answer["output_ids"] = [t[1] for t in triples]
        return answer

    return spoil


HTTP_FAULTS = {
    "refuses for a while": (500, {}, b"oops", 0.0),
    "overloaded": (429, {"Retry-After": "0.05"}, b"slow down", 0.0),
    "dies": (0, {}, b"", 0.0),
    "silent": (200, {}, None, 0.0),
    "cut short": (200, {"Content-Length": "1000"}, b'{"output_ids": [', 0.0),
    "not JSON": (200, {}, b"<html>", 0.0),
    "deep": (200, {}, b"[" * 100_000, 0.0),
}


@pytest.mark.parametrize("fault", HTTP_FAULTS)
def test_what_passes_is_asked_again(sampled, policy, server, fault):
    engine = patient(sampled["sglang"], timeout_seconds=1.0 if fault == "silent" else 20.0)
    roll(engine, policy, charts=1, group=1, turns=1)
    count = len(server.requests)
    server.fault = lambda number, path: HTTP_FAULTS[fault] if number == count else None
    roll(engine, policy, charts=1, group=1, turns=1)
    assert len(server.requests) == count + 2


@pytest.mark.parametrize(
    "fault, said",
    [
        ("refuses for a while", "HTTP 500: oops"),
        ("dies", "RemoteDisconnected"),
        ("silent", "no answer within 0.3 seconds"),
        ("not JSON", "an answer of 6 bytes that is no JSON"),
    ],
)
def test_what_does_not_pass_ends_the_run_in_one_line(sampled, policy, server, fault, said):
    engine = patient(sampled["sglang"], timeout_seconds=20.0)
    roll(engine, policy, charts=1, turns=1)
    patient(engine, timeout_seconds=0.3)
    server.fault = lambda number, path: HTTP_FAULTS[fault]
    with pytest.raises(ServerDown) as caught:
        roll(engine, policy)
    line = explain(caught.value)
    assert line.startswith(f"engine.url={server.url!r}: {said}") and "(3 attempts)" in line
    assert "give the same command again" in line
    patient(engine, timeout_seconds=20.0)


def test_a_server_that_is_gone_ends_the_run_and_leaves_no_thread(sampled, policy):
    engine = patient(sampled["sglang"], timeout_seconds=20.0)
    roll(engine, policy, charts=1, turns=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    before = engine.rollouts.address
    engine.rollouts.address = dataclasses.replace(before, url=url)
    with pytest.raises(ServerDown, match="ConnectionRefusedError"):
        roll(engine, policy)
    engine.rollouts.address = before
    assert not [t for t in threading.enumerate() if t.name.startswith("engine")]


def test_a_failed_question_ends_those_that_wait(sampled, policy, server):
    """One server answers 400 while others are silent: the run does not wait for them."""
    engine = patient(sampled["sglang"], timeout_seconds=60.0)
    roll(engine, policy, charts=1, turns=1)
    count = len(server.requests)

    def fault(number, path):
        return (400, {}, b"too long", 0.3) if number == count else HTTP_FAULTS["silent"]

    server.fault = fault
    start = time.monotonic()
    with pytest.raises(ServerDown, match="HTTP 400: too long"):
        roll(engine, policy)
    assert time.monotonic() - start < 20


WRONG = {
    "no ids": (spoiled(output_ids=None), "output_ids is missing"),
    "no object": (lambda answer: [answer] if "meta_info" in answer else answer, "meta_info is"),
    "no log-probabilities": (spoiled(output_token_logprobs="x"), "output_token_logprobs is"),
    "flat log-probabilities": (spoiled(output_token_logprobs=[1.0]), "not .log-probability"),
    "one log-probability less": (spoiled(output_token_logprobs=lambda x: x[:-1]), "others"),
    "other ids": (spoiled(output_ids=lambda x: [*x[:-1], x[-1] ^ 1]), "others"),
    "another prompt": (spoiled(prompt_tokens=lambda x: x + 1), "a prompt of .* tokens where"),
    "other weights": (spoiled(weight_version="default"), "weights 'default' instead of 'policy-"),
    "an id too large": (tokens(lambda x: [*x[:-1], [-1.0, 10**6]]), "token 7 is 1000000"),
    "an id below": (tokens(lambda x: [*x[:-1], [-1.0, -1]]), "token 7 is -1"),
    "half an id": (tokens(lambda x: [*x[:-1], [-1.0, 5.5]]), "token 7 is 5.5"),
    "NaN": (tokens(lambda x: [*x[:-1], [float("nan"), 5]]), "log-probability nan"),
    "a word": (tokens(lambda x: [*x[:-1], ["-1", 5]]), "log-probability -1"),
    "above 0": (tokens(lambda x: [*x[:-1], [0.5, 5]]), "log-probability 0.5"),
    "nothing": (tokens(lambda x: []), "a response of 0 tokens"),
    "too long": (tokens(lambda x: x * 2), "a response of 16 tokens; asked were 1 to 8"),
    "cut": (tokens(lambda x: x[:5]), "without an end token after 5 of at most 8"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_answer_is_no_response(sampled, policy, server, wrong):
    spoil, said = WRONG[wrong]
    engine = patient(sampled["sglang"], timeout_seconds=20.0)
    never_ends = {"eos_ids": (10**5,)}  # so that a response has its 8 tokens
    sampler = engine.sampler
    spec = sampler.spec
    try:
        sampler.spec = dataclasses.replace(spec, **never_ends)
        server.spoil = spoil
        with pytest.raises(ServerDown, match=f"{said}.*3 attempts"):
            roll(engine, policy, charts=1, group=1, turns=1)
        assert len(server.questions()) == 3
    finally:
        sampler.spec = spec


SPEC = SamplerSpec(6, (9, 10), (2,), 0, 1.0, 6, stop=((7, 8),))
ASKED = Question(np.array([1, 5, 5, 5, 3]), 5, (Picture("data:", "ab"),), 6, 1, "policy-000001")


def check(ids, logps=None, spec=SPEC):
    return checked(Written(ids, [-1.0] * len(ids) if logps is None else logps), ASKED, spec, 20)


def test_ends_and_stop_sequences():
    assert check([4, 2]).finished and not check([4] * 6).finished
    assert check([4, 4, 4, 4, 4, 2]).finished
    stopped = check([4, 7, 8, 4, 7, 8])
    assert stopped.finished and stopped.ids.tolist() == [4, 7, 8] and len(stopped.logps) == 3
    assert not check([7, 7, 7, 7, 7, 7]).finished
    np.testing.assert_array_equal(check([4, 2], [5e-4, -2.0]).logps, np.float32([0, -2]))


@pytest.mark.parametrize(
    "ids, logps, said",
    [
        ([4, 9, 2], None, "token 1 is 9, which is never sampled"),
        ([4, 2, 4], None, "goes on behind its end token 2 at 1"),
        ([True, 2], None, "token 0 is True"),
        ([4, 2], [-1.0], "2 tokens with 1 log-probabilities"),
        ([4, 2], [-1.0, float("-inf")], "log-probability -inf"),
        ([4, 20], None, "ids are from 0 to 19"),
        ([4, 4], None, "ends without an end token after 2 of at most 6"),
    ],
)
def test_what_cannot_be_a_response(ids, logps, said):
    with pytest.raises(BadAnswer, match=said):
        check(ids, logps)


def test_a_picture_is_one_placeholder_and_has_a_name_per_policy():
    assert ASKED.compact == [1, 5, 3]
    two = dataclasses.replace(ASKED, ids=np.array([5, 5, 1, 5, 3]))
    assert two.compact == [5, 1, 5, 3]
    picture = ASKED.pictures[0]
    assert picture.under("policy-000001") != picture.under("policy-000002")
    assert Picture.of(b"x").name != Picture.of(b"y").name


@pytest.mark.parametrize("dialect", [Sglang(), Vllm()])
def test_a_question_bends_no_probability_and_forbids_what_is_forbidden(dialect):
    body = dialect.question(ASKED, SPEC)
    asked = body["sampling_params"]
    assert asked["logit_bias"] == {"9": -100.0, "10": -100.0}
    assert (asked["temperature"], asked["top_p"], asked["min_p"]) == (1.0, 1.0, 0.0)
    assert asked["top_k"] in (-1, 0) and asked["repetition_penalty"] == 1.0
    assert asked["stop_token_ids"] == [2] and json.dumps(body)
    assert 6 in (asked.get("max_tokens"), asked.get("max_new_tokens"))
    bare = dataclasses.replace(ASKED, ids=np.array([1, 3]), pictures=())
    assert not {"image_data", "mm_hashes", "content_parts"} & set(dialect.question(bare, SPEC))


def test_vllm_says_which_prompt_it_read():
    good = {
        "prompt_token_ids": [1, 5, 5, 5, 3],
        "choices": [
            {"token_ids": [4], "logprobs": {"content": [{"token_id": 4, "logprob": -0.5}]}}
        ],
    }
    assert Vllm().read(good, ASKED) == Written([4], [-0.5])
    for change, said in (
        ({"prompt_token_ids": [1, 5, 5, 5, 4]}, "other ids than were sent"),
        ({"prompt_token_ids": [1, 5, 5, 3]}, "a prompt of 4 tokens"),
        ({"prompt_token_ids": None}, "prompt_token_ids is missing"),
        ({"choices": []}, "0 choices"),
        ({"choices": [{"token_ids": [4], "logprobs": None}]}, "logprobs is missing"),
        ({"choices": [good["choices"][0] | {"token_ids": [5]}]}, "of 1 others"),
    ):
        with pytest.raises(BadAnswer, match=said):
            Vllm().read(good | change, ASKED)
    with pytest.raises(BadAnswer, match="no JSON"):
        parsed(b"\xff")


def test_no_message_shows_the_key(stages, policy, server, monkeypatch):
    monkeypatch.setenv("MMRECODER_ENGINE_KEY", "secret-42-secret")
    engine = patient(stages("sglang").engine(ScriptedEnv(), 1.0))
    server.fault = lambda number, path: (401, {}, b"who is secret-42-secret?", 0.0)
    with pytest.raises(ServerDown, match=r"HTTP 401: who is \*\*\*\?.*check engine.url") as caught:
        roll(engine, policy, charts=1)
    assert "secret" not in str(caught.value)
    assert server.headers[0]["Authorization"] == "Bearer secret-42-secret"


def test_kinds_that_do_not_exist_are_refused(policy):
    config = policy.stage_with({"engine.kind": "tgi"}).config
    with pytest.raises(ConfigError, match=r"engine\.kind='tgi'"):
        make_rollouts(config, "", policy.stage.model.config, policy.stage.tokenizer)
