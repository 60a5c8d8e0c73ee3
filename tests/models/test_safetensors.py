"""Files of safetensors and their index: what a damaged one is answered with."""

import json

import numpy as np
import pytest

from mmrecoder_jax.models import safetensors
from mmrecoder_jax.models.files import CheckpointError
from tests.models.test_published import LFS

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.float32)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def directory(tmp_path):
    safetensors.write_directory(tmp_path, [("a", A), ("b", B)], shard_bytes=24)
    return tmp_path


@pytest.fixture
def single(tmp_path):
    safetensors.write_file(tmp_path / safetensors.SINGLE, {"a": A, "b": B})
    return tmp_path


@pytest.mark.parametrize("kind", ["directory", "single"])
def test_what_is_written_is_read(kind, request):
    tensors = safetensors.open_directory(request.getfixturevalue(kind))
    np.testing.assert_array_equal(tensors["a"], A)
    np.testing.assert_array_equal(tensors["b"], B)


def header(path, change):
    """Writes the header of a file again, changed in place or replaced by what `change` returns."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8:end])
    content = change(content) or content
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def entry(**changes):
    return lambda path: header(path, lambda h: h["a"].update(changes))


DAMAGED = "the file is damaged, copy it again"
FILES = [
    (lambda p: p.write_text(LFS), "a git-lfs pointer, .*`git lfs pull`"),
    (lambda p: p.write_text("<!doctype html>" + "x" * 3000), "a web page.*download"),
    (lambda p: p.write_text('{"error": "Repository not found"}'), "33 bytes that are no safetens"),
    (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(500)), "504 bytes that are no safetensors"),
    (lambda p: p.write_bytes(b"GGUF" + bytes(500)), "504 bytes that are no safetensors"),
    (lambda p: p.write_bytes(b""), "an empty file; download"),
    (lambda p: p.write_bytes(bytes(5)), "5 bytes that are no safetensors"),
    (lambda p: p.write_bytes(bytes(100)), "100 bytes that are no safetensors"),
    (lambda p: p.write_bytes(p.read_bytes()[:40]), "cut short, the header alone ends at byte"),
    (lambda p: p.write_bytes(p.read_bytes()[:-4]), "cut short, b ends at byte 40 of 36"),
    (lambda p: p.write_bytes(p.read_bytes() + bytes(8)), "8 bytes too long for its header"),
    (lambda p: header(p, lambda h: [1]), "no safetensors file"),
    (lambda p: header(p, lambda h: b"{no JSON!"), "header: no JSON, or cut short"),
    (lambda p: header(p, lambda h: b'{"\xff": 1}'), "header: no UTF-8 text"),
    (lambda p: header(p, lambda h: h | {"a": None}), f"a is null in the header; {DAMAGED}"),
    (lambda p: header(p, lambda h: h["a"].pop("dtype") and None), "a has dtype null; known are"),
    (lambda p: header(p, lambda h: h["a"].pop("data_offsets") and None), "a has data_offsets null"),
    (lambda p: header(p, lambda h: h["a"].pop("shape") and None), "a has shape null in the header"),
    (entry(dtype="F8_E4M3"), 'a has dtype "F8_E4M3"; known are .*before quantisation'),
    (entry(dtype="I8"), 'a has dtype "I8"'),
    (entry(dtype=["F32"]), r"a has dtype \[.F32.\]"),
    (entry(shape=[999]), rf"a has 24 bytes, which are not \[999\] of F32; {DAMAGED}"),
    (entry(shape=[-2, -3]), r"a has shape \[-2, -3\] in the header"),
    (entry(shape="2x3"), 'a has shape "2x3"'),
    (entry(shape=[2.0, 3]), r"a has shape \[2.0, 3\]"),
    (entry(data_offsets=[-24, 0]), r"a has data_offsets \[-24, 0\]"),
    (entry(data_offsets=[24, 0]), r"a has data_offsets \[24, 0\]"),
    (entry(data_offsets=[0, 24, 24]), "a has data_offsets"),
    (entry(data_offsets=[0, 10**15]), "cut short, a ends at byte 1000000000000000 of 40"),
    (entry(data_offsets=[16, 40]), r"b overlaps the tensor before it|leaves a gap before it"),
    (lambda p: header(p, lambda h: h["b"].update(data_offsets=[8, 24])), "b overlaps the tensor"),
    (lambda p: header(p, lambda h: h.pop("a") and None), r"b leaves a gap before it \(byte 24 for"),
    (lambda p: header(p, lambda h: h.pop("b") and None), "16 bytes too long for its header"),
]


@pytest.mark.parametrize("damage, message", FILES)
def test_what_is_wrong_with_a_file_is_said(single, damage, message):
    path = single / safetensors.SINGLE
    damage(path)
    with pytest.raises(CheckpointError, match=message) as refusal:
        safetensors.open_directory(single)
    assert str(refusal.value).startswith(str(path)) and "\n" not in str(refusal.value)


def index(**changes):
    """Damage: other shards of these tensors; None takes one away."""

    def damage(directory):
        path = directory / safetensors.INDEX
        content = json.loads(path.read_text())
        shards = content["weight_map"] | changes
        content["weight_map"] = {name: x for name, x in shards.items() if x is not None}
        path.write_text(json.dumps(content))

    return damage


def only(*names):
    """Damage: nothing but files of these names, with a byte in each."""

    def damage(directory):
        for path in directory.iterdir():
            path.unlink()
        for name in names:
            (directory / name).write_bytes(b"x")

    return damage


def write_index(text):
    return lambda d: (d / safetensors.INDEX).write_text(text)


INDEX = "model.safetensors.index.json"
DIRECTORIES = [
    (write_index(LFS), f"{INDEX}: a git-lfs pointer"),
    (write_index("<html>"), f"{INDEX}: a web page"),
    (write_index(""), f"{INDEX}: an empty file"),
    (write_index("{"), f"{INDEX}: no JSON, or cut short"),
    (write_index("[]"), rf"{INDEX}: holds \[\]"),
    (write_index("{}"), f"{INDEX}: weight_map is null, but must name the shard"),
    (write_index('{"weight_map": {}}'), f"{INDEX}: weight_map is {{}}"),
    (write_index('{"weight_map": ["a"]}'), rf"{INDEX}: weight_map is \[.a.\]"),
    (index(a=7), f"{INDEX}: a is in 7, which is no file name"),
    (index(a="../" + FIRST), f"{INDEX}: a is in .*which is no file name"),
    (index(a="model-00003-of-00003.safetensors"), "model-00003-of-00003.safetensors missing, of 2"),
    (index(c=FIRST), f"{FIRST}: the index promises c, the shard lacks it"),
    (lambda d: (d / SECOND).unlink(), f"{SECOND} missing, of 2 shards"),
    (lambda d: (d / SECOND).write_bytes(b""), f"{SECOND}: an empty file"),
    (lambda d: ((d / SECOND).unlink(), (d / SECOND).symlink_to("gone")), f"{SECOND}: a link to go"),
    (lambda d: (d / "model.safetensors").write_bytes(b"x"), "both model.safetensors.index.json"),
    (lambda d: (d / INDEX).unlink(), f"{FIRST}, {SECOND} without {INDEX}"),
    (only(), f"neither {INDEX} nor model.safetensors; copy or download"),
    (only("pytorch_model.bin"), "but pytorch_model.bin, a format that is not read; convert it"),
    (only("consolidated.00.pth"), "but consolidated.00.pth, a format"),
    (only("model-q4.gguf", "notes.txt"), "but model-q4.gguf, a format"),
]


@pytest.mark.parametrize("damage, message", DIRECTORIES)
def test_what_is_wrong_with_a_directory_is_said(directory, damage, message):
    damage(directory)
    with pytest.raises((CheckpointError, FileNotFoundError), match=message) as refusal:
        safetensors.open_directory(directory)
    assert str(directory) in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_index_of_the_one_file_is_read(single):
    text = json.dumps({"weight_map": dict.fromkeys("ab", safetensors.SINGLE)})
    (single / safetensors.INDEX).write_text(text)
    assert sorted(safetensors.open_directory(single)) == ["a", "b"]


def test_unaligned_values_are_read(single):
    """Other writers do not pad the header."""
    path = single / safetensors.SINGLE
    header(path, lambda h: json.dumps(h).encode() + b" ")
    np.testing.assert_array_equal(safetensors.open_directory(single)["b"], B)
