"""Rollouts on a server that decodes the same policy through `transformers`: what it writes is what
our sampler would write, whatever goes wrong ends in one line, and the policy reaches it.
"""

import dataclasses
import itertools
import json
import socket
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pytest

from mmrecoder_jax import grpo
from mmrecoder_jax.command import explain
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.batching import BatchShape, Collate, TokenRow
from mmrecoder_jax.data.pipeline import learner_batch
from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.config import LoraConfig
from mmrecoder_jax.models.export import export_policy
from mmrecoder_jax.models.lora import merge
from mmrecoder_jax.models.processor import pixels_of, window_patches
from mmrecoder_jax.models.published import load_config
from mmrecoder_jax.models.qwen2_5_vl import init_params
from mmrecoder_jax.models.safetensors import open_directory
from mmrecoder_jax.models.weights import to_tensors
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
    until_stop,
)
from mmrecoder_jax.rl.served.files import PolicyFiles
from mmrecoder_jax.rl.served.make import make_decoder
from mmrecoder_jax.rl.served.run import ServedDecoder, seed_of
from mmrecoder_jax.rl.trajectory import Mode
from mmrecoder_jax.rl.vision_features import FrozenTower
from mmrecoder_jax.rl.web import BadAnswer, ServerDown
from tests.learner.processes import run
from tests.rl.test_rollout import ScriptedEnv
from tests.rl.token_server import Scripted, TokenServer, Transformers
from tests.rows import first_micro, written

GROUP = 2
RESPONSE = {"rl.response_length": 12, "rl.decode_chunk": 5}  # as in test_rollout: its programs


@pytest.fixture(scope="module")
def server():
    """Decodes through transformers."""
    pytest.importorskip("torch")
    with TokenServer(Transformers()) as server:
        yield server


@pytest.fixture(scope="module")
def scripted(policy):
    """Decodes nothing."""
    with TokenServer(Scripted(policy.stage.layout.image_id)) as server:
        yield server


def engine_of(policy, server, workdir, kind="sglang", temperature=1.0, **fields):
    """A rollout engine whose conversations a server decodes."""
    fields = {"kind": kind, "url": server.url, "retries": 2, "timeout_seconds": 60.0} | fields
    fields = RESPONSE | {f"engine.{name}": value for name, value in fields.items()}
    stage = policy.stage_with(fields, workdir=str(workdir))
    return patient(stage.engine(ScriptedEnv(), temperature), pause_seconds=0.01)


def patient(engine, **changes):
    """The engine with another patience."""
    decoder = engine.decoder
    decoder.address = dataclasses.replace(decoder.address, **changes)
    return engine


class NoFiles:
    """In place of files that nobody reads."""

    def write(self, params):
        return Path("policy-000001")

    def forget_old(self):
        pass


@pytest.fixture
def asking(policy, scripted, tmp_path):
    """An engine that asks the scripted server, which has loaded the policy."""
    scripted.fault, scripted.spoil = lambda number, path: None, lambda answer: answer
    engine = engine_of(policy, scripted, tmp_path)
    engine.decoder.files = NoFiles()
    roll(engine, policy, charts=1, group=1, turns=1)
    scripted.requests.clear()
    scripted.headers.clear()
    return engine


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
    ours = written(first_micro(batch), logps)
    theirs = [np.concatenate([turn.logps for turn in t.turns]) for t in trajectories]
    return np.concatenate(ours) - np.concatenate(theirs)


# ---------------------------------------------------------------- what it writes


@pytest.mark.parametrize(
    "kind, mode",
    [
        ("sglang", Mode.SHARED_FIRST_TURN),
        ("sglang", Mode.FULL_TRAJECTORY),
        ("vllm", Mode.FULL_TRAJECTORY),
    ],
)
@pytest.mark.parity
def test_a_servers_tokens_have_the_learners_probabilities(policy, server, tmp_path, kind, mode):
    engine = engine_of(policy, server, tmp_path, kind)
    server.requests.clear()
    groups = roll(engine, policy, mode)
    assert [len(group) for group in groups] == [GROUP, GROUP]
    for first, second in groups:
        shared = np.array_equal(first.turns[0].ids, second.turns[0].ids)
        assert shared == (mode is Mode.SHARED_FIRST_TURN)
        assert not np.array_equal(first.turns[1].ids, second.turns[1].ids)
        assert [piece.turn for piece in first.pieces] == [0, 1, 0, 2]
    assert len(server.questions()) == (6 if mode is Mode.SHARED_FIRST_TURN else 8)
    assert np.abs(gap(policy.stage, policy, groups)).max() < 1e-3
    if mode is Mode.FULL_TRAJECTORY:
        turns = [turn for group in groups for t in group for turn in t.turns]
        assert engine.stats.tokens == sum(len(turn.ids) for turn in turns)


@pytest.mark.parity
def test_the_most_probable_ids_are_those_of_our_sampler(policy, server, tmp_path):
    ours = policy.stage_with(RESPONSE).engine(ScriptedEnv(), 0.0)
    theirs = engine_of(policy, server, tmp_path, temperature=0.0)
    assert ours.decoder is Run and isinstance(theirs.decoder, ServedDecoder)
    expected, found = (roll(x, policy, charts=1, group=1) for x in (ours, theirs))
    for a, b in zip(expected[0][0].turns, found[0][0].turns, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logps, b.logps, atol=2e-4)
        assert a.finished == b.finished


@pytest.mark.parity
def test_a_changed_policy_is_loaded_and_one_that_is_not_is_not(policy, server, tmp_path):
    engine, loaded = engine_of(policy, server, tmp_path), len(server.loaded)
    server.requests.clear()
    for _ in range(2):
        roll(engine, policy, turns=1)
        assert len(server.loaded) == loaded + 1
    changed = jax.tree.map(lambda x: x, policy.params)
    table = changed["model"]["embed_tokens"]["weight"]
    changed["model"]["embed_tokens"] = {"weight": table * 2}
    groups = roll(engine, policy, params=changed)
    assert np.abs(gap(policy.stage, policy, groups, changed)).max() < 1e-3
    assert np.abs(gap(policy.stage, policy, groups)).max() > 1e-2
    names = [path.rsplit("/", 1)[1] for path in server.loaded[loaded:]]
    assert names == ["policy-000001", "policy-000002"]
    first, *_, last = server.questions()
    assert first["mm_hashes"][0] != last["mm_hashes"][0], "features of old weights are used again"


def test_adapters_are_merged(policy, tmp_path):
    base = policy.stage.model.config
    sizes = dataclasses.replace(base, lora=LoraConfig(2, 4.0))
    rng, abstract = (
        np.random.default_rng(0),
        jax.eval_shape(lambda: init_params(sizes, jax.random.key(0))),
    )
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), abstract)
    pixels, tokenizer = (3136, 18816), policy.stage.tokenizer
    path = PolicyFiles(str(tmp_path), sizes, tokenizer, pixels, None).write(params)
    expected = dict(to_tensors(merge(params, sizes.lora), base, np.float32))
    found = open_directory(path)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x)


@pytest.mark.slow  # two processes
def test_hosts_share_a_server_and_the_main_one_loads_the_policy(policy, scripted, tmp_path):
    scripted.spoil, scripted.version = lambda answer: answer, "default"
    scripted.requests.clear()
    source, loaded = tmp_path / "source", len(scripted.loaded)
    sizes, tokenizer = policy.stage.model.config, policy.stage.tokenizer
    tensors = to_tensors(policy.params, sizes, np.float32)
    export_policy(source, tensors, sizes, tokenizer, (3136, 18816), "float32")
    questions = itertools.count()

    def fault(number, path):  # 12 of each of two rollouts, 6 of each host
        if path == "/generate" and next(questions) == 24:
            return 400, {}, b"no", 0.0

    scripted.fault = fault
    places = str(source), f"{policy.stage.workdir}/data", scripted.url, str(tmp_path / "run")
    outputs = run([sys.executable, "-m", "tests.rl.served_hosts_main", *places], 2, 300)
    ends = [out.splitlines()[-3:] for out in outputs]
    assert [end[:2] for end in ends] == [["[2, 2, 2, 2]"] * 2] * 2
    assert sorted(end[2] for end in ends) == ["OtherHost", "ServerDown"]
    (path,) = scripted.loaded[loaded:]
    written, read = open_directory(path), open_directory(source)
    for name, x in read.items():
        np.testing.assert_array_equal(written[name], x)


# ---------------------------------------------------------------- how it is asked


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_a_group_shares_its_first_turn_and_seeds_are_replayed(policy, scripted, tmp_path, kind):
    engine = engine_of(policy, scripted, tmp_path, kind)
    engine.decoder.files = NoFiles()
    runs = []
    for _ in range(2):
        scripted.requests.clear()
        roll(engine, policy, Mode.SHARED_FIRST_TURN, charts=1, group=4)
        runs.append(scripted.questions())
    assert [len(run) for run in runs] == [5, 5]
    name = {"sglang": "sampling_seed", "vllm": "seed"}[kind]
    seeds = [sorted(question["sampling_params"][name] for question in run) for run in runs]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 5
    prompts = [tuple(q.get("input_ids", q.get("token_ids"))) for q in runs[0]]
    assert len(set(prompts)) == 2
    seeds = {seed_of((0, 7), turn, uid) for turn in (1, 2) for uid in range(50)}
    assert len(seeds) == 100 and all(0 <= seed < 2**31 for seed in seeds)


def test_many_are_asked_at_one_time_and_no_more(asking, policy, scripted):
    asking.decoder.in_flight = 3
    scripted.most_at_once = 0
    pause = threading.Event()
    scripted.spoil = lambda answer: (pause.wait(0.2), answer)[1]
    roll(asking, policy, group=4, turns=1)
    assert scripted.most_at_once == 3


@pytest.mark.parametrize("mode", Mode)
def test_responses_rest_and_are_finished_in_a_later_rollout(asking, policy, scripted, mode):
    how = {"mode": mode, "group": GROUP, "turns": 2}
    groups, key = asking.begun(policy.charts[:1], [3], **how), jax.random.key(7)
    rests = []
    while not rests or rests[-1]:
        asking.run(policy.params, groups, key, turns=2, budget=5)
        rests.append(groups[0].rests)
    assert len(rests) == 5  # 5, 5, 2 tokens of each turn; the first end where the others begin
    first = [question["sampling_params"]["max_new_tokens"] for question in scripted.questions()]
    shared = mode is Mode.SHARED_FIRST_TURN
    assert sorted(first) == sorted(([5, 5, 2] * (1 if shared else GROUP)) + [5, 5, 2] * GROUP)
    prompt = scripted.questions()[0]["input_ids"]
    later = [q["input_ids"][: len(prompt) + 10] for q in scripted.questions()]
    assert [*prompt, *[5] * 10] in later, "the beginning of a response is not shown"
    for talk in groups[0].talks:
        assert [len(turn.ids) for turn in talk.turns] == [12, 12] and talk.draft is None


def test_work_of_the_devices_is_done_while_the_server_writes(asking, policy, scripted):
    arrived = threading.Event()
    scripted.fault = lambda number, path: arrived.set()
    done = []

    def meanwhile():
        done.append(arrived.wait(20))
        raise OSError("the disk is full")

    groups = asking.begun(policy.charts[:1], [3], mode=Mode.FULL_TRAJECTORY, group=1, turns=1)
    with pytest.raises(OSError, match="disk"):
        asking.run(policy.params, groups, jax.random.key(7), turns=1, meanwhile=meanwhile)
    assert done == [True] and not [t for t in threading.enumerate() if "engine" in t.name]


def test_a_stop_sequence_may_begin_in_an_earlier_rollout(asking, policy, scripted):
    sampler = asking.sampler
    sampler.spec = dataclasses.replace(sampler.spec, stop=((5,) * 7,))
    groups = asking.begun(policy.charts[:1], [3], mode=Mode.FULL_TRAJECTORY, group=1, turns=1)
    for _ in range(2):
        asking.run(policy.params, groups, jax.random.key(7), turns=1, budget=5)
    (turn,) = groups[0].talks[0].turns
    assert len(turn.ids) == 7 and turn.finished


def test_features_of_a_frozen_tower_are_there_for_the_learner(policy, scripted, tmp_path):
    engine = engine_of(policy, scripted, tmp_path)
    engine.decoder.files = NoFiles()
    stage = policy.stage
    engine.tower = FrozenTower(stage.model, stage.mesh, stage.layout, (6, 12))
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


def test_two_policies_stay_on_disk(policy, scripted, tmp_path):
    files = engine_of(policy, scripted, tmp_path).decoder.files
    (tmp_path / "served" / "policy-000009.tmp").mkdir(parents=True)  # of a run that was killed
    for number in (1, 2, 3):
        path = files.write(policy.params)
        files.forget_old()
        assert path == tmp_path / "served" / f"policy-{number:06d}"
    assert sorted(p.name for p in path.parent.iterdir()) == ["policy-000002", "policy-000003"]
    assert load_config(path).hidden_size == policy.stage.model.config.hidden_size


def test_a_policy_that_cannot_be_loaded_ends_the_run(asking, policy, scripted):
    no = json.dumps({"success": False, "message": "no room"}).encode()
    for answer, said in (
        ((200, {}, no, 0.0), r"was not confirmed.*no room.*3 attempts"),
        ((400, {}, b"bad path", 0.0), "HTTP 400: bad path"),
    ):
        asking.decoder._loaded = []
        scripted.fault = lambda number, path, answer=answer: answer
        with pytest.raises(ServerDown, match=said):
            roll(asking, policy, charts=1)
    scripted.fault = lambda number, path: None
    loaded = len(scripted.loaded)
    roll(asking, policy, charts=1, turns=1)
    assert len(scripted.loaded) == loaded + 1, "what failed must be tried again"


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


FAULTS = {
    "refuses for a while": (500, {}, b"oops", 0.0),
    "overloaded": (429, {"Retry-After": "0.05"}, b"slow down", 0.0),
    "dies": (0, {}, b"", 0.0),
    "silent": (200, {}, None, 0.0),
    "stalls": (200, {"Content-Length": "1000"}, b'{"output_ids": [', 0.0),
    "cut short": (200, {"Content-Length": "99", "Connection": "close"}, b'{"output_ids": [', 0.0),
    "not JSON": (200, {}, b"<html>", 0.0),
    "deep": (200, {}, b"[" * 100_000, 0.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_asked_again(asking, policy, scripted, fault):
    if fault in ("silent", "stalls"):
        patient(asking, timeout_seconds=2.0)
    scripted.fault = lambda number, path: FAULTS[fault] if number == 0 else None
    roll(asking, policy, charts=1, group=1, turns=1)
    assert len(scripted.requests) == 2


def test_retry_after_is_obeyed(asking, policy, scripted):
    wait = (429, {"Retry-After": "0.6"}, b"", 0.0)
    scripted.fault = lambda number, path: wait if number == 0 else None
    start = time.monotonic()
    roll(asking, policy, charts=1, group=1, turns=1)
    assert time.monotonic() - start >= 0.6


@pytest.mark.parametrize(
    "fault, said",
    [
        ("refuses for a while", "HTTP 500: oops"),
        ("dies", "RemoteDisconnected: "),
        ("silent", "TimeoutError: no answer within 0.3 seconds"),
        ("not JSON", "an answer of 6 bytes that is no JSON"),
    ],
)
def test_what_does_not_pass_ends_the_run_in_one_line(asking, policy, scripted, fault, said):
    patient(asking, timeout_seconds=0.3 if fault == "silent" else 60.0)
    scripted.fault = lambda number, path: FAULTS[fault]
    with pytest.raises(ServerDown) as caught:
        roll(asking, policy)
    line = explain(caught.value)
    assert line.startswith(f"engine.url={scripted.url!r}: {said}") and "(3 attempts)" in line
    assert "give the same command again" in line


def test_a_server_that_dies_half_way_ends_the_run_and_leaves_no_thread(asking, policy, scripted):
    """From the third response on nobody is there."""
    scripted.fault = lambda number, path: FAULTS["dies"] if number > 2 else None
    with pytest.raises(ServerDown, match="3 attempts"):
        roll(asking, policy)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        patient(asking, url=f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(ServerDown, match="ConnectionRefusedError"):
        roll(asking, policy)
    assert not [t for t in threading.enumerate() if t.name.startswith("engine")]


def test_a_failed_question_ends_those_that_wait(asking, policy, scripted):
    """One is refused while others hang: the run does not wait for them."""
    refused = 400, {}, b"too long", 0.3
    scripted.fault = lambda number, path: refused if number == 0 else FAULTS["silent"]
    start = time.monotonic()
    with pytest.raises(ServerDown, match="HTTP 400: too long"):
        roll(asking, policy)
    assert time.monotonic() - start < 15


def test_a_slow_response_holds_up_nobody(asking, policy, scripted):
    """The second question is answered when the third has come: another conversation's next turn."""
    third, waited = threading.Event(), []

    def fault(number, path):
        if number == 1:
            waited.append(third.wait(10))
        elif number == 2:
            third.set()

    scripted.fault = fault
    roll(asking, policy, charts=1)
    assert waited == [True]


def test_scripts_of_others_do_not_hold_up_the_server(asking, policy, scripted):
    """A conversation whose script runs for ever, and one that goes on meanwhile."""
    hangs, submit = Future(), asking.env.submit
    asked = []

    def one_hangs(code):
        asked.append(code)
        return hangs if len(asked) == 1 else submit(code)

    asking.env.submit = one_hangs

    def fault(number, path):
        if number == 2:  # a second turn, while the script of another first turn still runs
            hangs.set_result(Execution(Status.ERROR, error="late"))

    scripted.fault = fault
    groups = roll(asking, policy, charts=1)
    assert len(scripted.requests) == 4 and all(len(t.turns) == 2 for t in groups[0])


WRONG = {
    "no ids": (spoiled(output_ids=None), "output_ids is missing"),
    "no object": (lambda answer: [answer] if "meta_info" in answer else answer, "meta_info is"),
    "no log-probabilities": (spoiled(output_token_logprobs="x"), "output_token_logprobs is"),
    "flat log-probabilities": (spoiled(output_token_logprobs=[1.0]), "not .log-probability"),
    "one log-probability less": (spoiled(output_token_logprobs=lambda x: x[:-1]), "others"),
    "other ids": (spoiled(output_ids=lambda x: [*x[:-1], x[-1] ^ 1]), "others"),
    "another prompt": (spoiled(prompt_tokens=lambda x: x + 1), "a prompt of .* tokens where"),
    "other weights": (spoiled(weight_version="default"), "weights 'default' instead of 'policy-"),
    "an id too large": (tokens(lambda x: [*x[:-1], [-1.0, 10**6]]), "token 11 is 1000000"),
    "an id below": (tokens(lambda x: [*x[:-1], [-1.0, -1]]), "token 11 is -1"),
    "half an id": (tokens(lambda x: [*x[:-1], [-1.0, 5.5]]), "token 11 is 5.5"),
    "NaN": (tokens(lambda x: [*x[:-1], [float("nan"), 5]]), "log-probability nan"),
    "a word": (tokens(lambda x: [*x[:-1], ["-1", 5]]), "log-probability -1"),
    "above 0": (tokens(lambda x: [*x[:-1], [0.5, 5]]), "log-probability 0.5"),
    "nothing": (tokens(lambda x: []), "a response of 0 tokens"),
    "too long": (tokens(lambda x: x * 2), "a response of 24 tokens; asked were 1 to 12"),
    "cut": (tokens(lambda x: x[:5]), "without an end token after 5 of at most 12"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_answer_is_no_response(asking, policy, scripted, wrong):
    scripted.spoil, said = WRONG[wrong]
    with pytest.raises(ServerDown, match=f"{said}.*3 attempts"):
        roll(asking, policy, charts=1, group=1, turns=1)
    assert len(scripted.questions()) == 3


SPEC = SamplerSpec(6, (9, 10), (2,), 0, 1.0, 6, stop=((7, 8),))
ASKED = Question(np.array([1, 5, 5, 5, 3]), 5, (Picture("data:", "ab"),), 6, 1, "policy-000001")


def check(ids, logps=None, spec=SPEC):
    return checked(Written(ids, [-1.0] * len(ids) if logps is None else logps), ASKED, spec, 20)


def test_ends_and_stop_sequences():
    assert check([4, 2]).finished and not check([4] * 6).finished
    assert check([4, 4, 4, 4, 4, 2]).finished
    stopped = until_stop(check([4, 7, 8, 4, 7, 8]), SPEC.stop)
    assert stopped.finished and stopped.ids.tolist() == [4, 7, 8] and len(stopped.logps) == 3
    goes_on = until_stop(check([7, 7, 7, 7, 7, 7]), SPEC.stop)
    assert not goes_on.finished and len(goes_on.ids) == 6
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
def test_a_question_bends_no_probability_and_forbids_ids(dialect):
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


def test_no_message_shows_the_key(asking, policy, scripted, monkeypatch):
    monkeypatch.setenv("MMRECODER_ENGINE_KEY", "secret-42-secret")
    scripted.fault = lambda number, path: (401, {}, b"who is secret-42-secret?", 0.0)
    with pytest.raises(ServerDown, match=r"HTTP 401: who is \*\*\*\?.*check engine.url") as caught:
        roll(asking, policy, charts=1)
    assert "secret" not in str(caught.value)
    assert scripted.headers[0]["Authorization"] == "Bearer secret-42-secret"


def test_kinds_that_do_not_exist_are_refused(policy):
    config = policy.stage_with({"engine.kind": "tgi"}).config
    with pytest.raises(ConfigError, match=r"engine\.kind='tgi'"):
        make_decoder(config, "", policy.stage.model.config, policy.stage.tokenizer)


# ---------------------------------------------------------------- a training step


@pytest.mark.parity
def test_a_step_of_grpo_trains_on_what_a_server_wrote(policy, server, pool, tmp_path):
    fields = {
        "engine.kind": "sglang",
        "engine.url": server.url,
        "data.dir": f"{policy.stage.workdir}/data",
        "data.lengths": (144,),
        "data.windows": (12,),
        "rl.response_length": 12,
        "rl.group": 2,
        "train.steps": 2,
        "train.batch_size": 2,
        "train.micro_batch_size": 4,
        "rl.max_logp_gap": 1e-3,
    }
    stage, loaded = policy.stage_with(fields, workdir=str(tmp_path)), len(server.loaded)
    grpo.train(stage, pool)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["logp_gap"] < 1e-3 and not row["skipped"] and row["rollout/tokens"] > 0
    assert len(server.loaded) - loaded == 2, "each step's policy is loaded once"
