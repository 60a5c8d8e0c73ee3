"""Folders that stand for addresses in buckets: what is copied, when, and what a kill leaves."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmrecoder_jax import places
from mmrecoder_jax.bucket import client
from mmrecoder_jax.config import ConfigError, check_place, work_directory
from mmrecoder_jax.places import BucketError

RUN = "gs://bucket/runs/a"


def opened(address=RUN, host=0):
    """The folder of an address in a process that knows nothing yet."""
    for copy in places._copies:
        if copy.host is not None:
            copy.unlock()
    places._copies.clear()
    return Path(places.local(address, host))


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "address", ["gs://", "gs://b", "gs://bucket", "gs://bucket/", "gs:///a", "gs://B/a"]
)
def test_an_address_names_a_folder_in_a_bucket(address):
    with pytest.raises(ConfigError, match=r"^--workdir='gs://.*: name a folder in a bucket"):
        check_place("--workdir", address)


@pytest.mark.parametrize("address", ["gs://bucket/a/../b", "gs://bucket/a//b", "gs://bucket/a\nb"])
def test_odd_folders_are_refused(address):
    with pytest.raises(ConfigError, match="name a folder in a bucket"):
        check_place("--workdir", address)


def test_other_places_are_as_before():
    check_place("--workdir", "runs/a")
    for path in ("s3://bucket/a", "gs:/bucket/a"):
        with pytest.raises(ConfigError, match=r"^--workdir='.* gs://BUCKET/PATH, or a local"):
            check_place("--workdir", path)
    with pytest.raises(ConfigError, match=r"^--workdir='~/a': no shell"):
        check_place("--workdir", "~/a")


def test_without_the_packages_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(client.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed \(gcsfs, .*pip install 'mmrecoder_jax\["):
        check_place("--workdir", RUN)


def test_local_paths_are_left_alone(tmp_path):
    path = str(tmp_path)
    assert places.local(path, 0) == path and places.shown(path) == path
    places.push(path)
    with places.pushed(path):
        assert not places.has_checkpoints(path)
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    (tmp_path / "checkpoints" / "13.tmp").mkdir()
    assert places.has_checkpoints(path) and places.steps(path) == [12]
    assert places.checkpoints(path) == tmp_path / "checkpoints"
    code = "import sys; from mmrecoder_jax import config; sys.exit('gcsfs' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_written_here_comes_there_and_back(cloud):
    run = opened()
    write(run, config__json="{}", trajectories__1="one", tokenizer__a__b="deep", x__tmp="")
    (run / "half.tmp").write_text("")
    places.push(str(run))
    (run / "half.tmp").unlink()
    there = cloud.below("runs/a/")
    assert there == {
        "config/json": b"{}",
        "tokenizer/a/b": b"deep",
        "trajectories/1": b"one",
        "x/tmp": b"",
    }
    (run / "trajectories" / "1").unlink()
    write(run, config__json="{1}", trajectories__2="two")
    places.push(str(run / "trajectories"))  # any directory in it
    assert cloud.below("runs/a/trajectories/") == {"2": b"two"}
    before = len(cloud.requests)
    places.push(str(run))
    assert len(cloud.requests) == before  # nothing has changed
    write(run, config__json="not pushed", later="not pushed")
    again = opened()
    assert again == run and names(run) == [
        "config/json",
        "tokenizer/a/b",
        "trajectories/2",
        "x/tmp",
    ]
    assert (run / "config" / "json").read_text() == "{1}"
    assert opened("gs://bucket/runs/a") != Path(places.local("gs://bucket/runs/ab", 0))


def test_only_what_differs_is_fetched(cloud):
    cloud.store("bucket", "runs/a/one", b"1")
    cloud.store("bucket", "runs/a/two", b"2")
    opened()
    cloud.store("bucket", "runs/a/two", b"3")
    cloud.requests.clear()
    run = opened()
    assert (run / "two").read_text() == "3"
    assert not [path for _, path in cloud.requests if path.endswith("/one")]


def test_rows_are_appended_in_parts(cloud):
    run = opened()
    rows = run / "metrics.jsonl"
    rows.write_bytes(b"x" * 70_000 + b"\n")
    places.push(str(run))
    for number in range(3):
        with rows.open("ab") as f:
            f.write(f"row {number}\n".encode())
        places.push(str(run))
    there = cloud.below("runs/a/")
    assert len(there.pop("metrics.jsonl")) == 70_001
    assert there == {
        f"metrics.jsonl.parts/{70_001 + 6 * number:012d}": f"row {number}\n".encode()
        for number in range(3)
    }
    whole = rows.read_bytes()
    rows.unlink()
    again = opened()
    assert (again / "metrics.jsonl").read_bytes() == whole
    assert names(again) == ["metrics.jsonl"]
    with places.pushed(str(again)):
        pass
    assert cloud.below("runs/a/") == {"metrics.jsonl": whole}


def test_a_long_file_that_is_removed_while_it_is_copied(cloud, monkeypatch):
    run = opened()
    write(run, **{"metrics.jsonl": "1" * 70_000})
    places.push(str(run))
    with open(run / "metrics.jsonl", "a") as file:
        file.write("2")
    (copy,) = places._copies
    seen = copy._walk()
    (run / "metrics.jsonl").unlink()
    with monkeypatch.context() as earlier:
        earlier.setattr(copy, "_walk", lambda: seen)
        places.push(str(run))
    places.push(str(run))
    assert not cloud.below("runs/a/")


def test_rows_that_are_taken_back_leave_no_part(cloud):
    run = opened()
    rows = run / "metrics.jsonl"
    rows.write_bytes(b"x" * 70_000)
    places.push(str(run))
    with rows.open("ab") as f:
        f.write(b"later")
    places.push(str(run))
    (run / "new").write_bytes(b"x" * 69_000)
    os.replace(run / "new", rows)
    places.push(str(run))
    assert {name: len(data) for name, data in cloud.below("runs/a/").items()} == {
        "metrics.jsonl": 69_000
    }


def test_a_part_that_does_not_follow_is_left_out(cloud):
    cloud.store("bucket", "runs/a/m.jsonl", b"ab")
    cloud.store("bucket", "runs/a/m.jsonl.parts/000000000002", b"cd")
    cloud.store("bucket", "runs/a/m.jsonl.parts/000000000009", b"ef")
    run = opened()
    assert (run / "m.jsonl").read_bytes() == b"abcd"
    places.push(str(run))
    assert cloud.below("runs/a/") == {"m.jsonl": b"abcd"}


def test_a_directory_appears_whole_or_not_at_all(cloud):
    run = opened()
    write(run, config="c", data__train__one="1", data__train__two="2")

    def two_is_refused(method, path, query):
        uploads = [p for m, p in cloud.requests if m == "POST"]
        return 403 if method == "POST" and len(uploads) > 2 else None

    cloud.requests.clear()
    cloud.fault = two_is_refused
    with pytest.raises(BucketError, match=f"^{RUN}: this account may not do that"):
        places.push(str(run))
    cloud.fault = lambda *request: None
    assert "data/.uploading" in cloud.below("runs/a/")
    again = opened()
    assert not (again / "data").exists() or not names(again / "data")
    assert not [name for name in cloud.below("runs/a/") if name.startswith("data/")]
    write(again, data__train__one="1", data__train__two="2")
    places.push(str(again))
    assert sorted(cloud.below("runs/a/data/")) == ["train/one", "train/two"]


def test_a_source_that_is_being_written_is_refused(cloud):
    cloud.store("bucket", "weights/.uploading", b"")
    cloud.store("bucket", "weights/config.json", b"{}")
    with pytest.raises(BucketError, match="is being written, or half of it is"):
        places.local("gs://bucket/weights")


def test_of_a_work_directory_a_source_is_what_a_stage_starts_from(cloud):
    for name in ("config.json", "model.json", "tokenizer/t", "trajectories/1.jsonl", "data/x"):
        cloud.store("bucket", f"runs/a/{name}", name.encode())
    for step in (3, 6):
        cloud.store("bucket", f"runs/a/checkpoints/{step}/params/x", b"p")
    cloud.store("bucket", "runs/a/checkpoints/3/commit_success.txt", b"")
    source = places.local(f"{RUN}@best")
    assert source.endswith("-source/a@best")
    workdir = work_directory(source)
    assert names(Path(workdir)) == ["config.json", "model.json", "tokenizer/t"]
    assert places.steps(workdir) == [3]  # 6 was never finished
    assert str(places.checkpoints(workdir)) == f"{RUN}/checkpoints"
    assert places.shown(f"at {workdir}/checkpoints") == f"at {RUN}/checkpoints"
    names_there = [name for name, _ in places.files(places.checkpoints(workdir) / "3")]
    assert names_there == ["commit_success.txt", "params/x"]


def test_a_half_fetched_source_is_fetched_again(cloud):
    cloud.store("bucket", "weights/config.json", b"{}")
    cloud.store("bucket", "weights/model.safetensors", b"w" * 1000)
    cloud.fault = lambda method, path, query: 403 if path.endswith("safetensors") else None
    with pytest.raises(BucketError):
        places.local("gs://bucket/weights")
    cloud.fault = lambda *request: None
    folder = Path(places.local("gs://bucket/weights"))
    assert names(folder) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").stat().st_size == 1000


def test_sources_that_are_not_there(cloud):
    with pytest.raises(BucketError, match=r"^gs://bucket/none: there is nothing in the bucket"):
        places.local("gs://bucket/none")
    with pytest.raises(BucketError, match=r"^gs://no-bucket/a: there is no such bucket"):
        places.local("gs://no-bucket/a")
    with pytest.raises(BucketError, match=r"^gs://no-bucket/a: there is no such bucket"):
        places.reach("gs://no-bucket/a")


@pytest.mark.parametrize("status, said", [(403, "this account may not"), (401, "this account may")])
def test_without_rights_the_account_is_named(cloud, status, said):
    places.reach(RUN)
    assert not cloud.objects["bucket"]
    cloud.fault = lambda method, path, query: status if method == "POST" else None
    with pytest.raises(BucketError, match=f"^{RUN}: {said}.*gcloud auth application-default login"):
        places.reach(RUN)


def test_a_bucket_that_does_not_answer_is_told_in_time(cloud, monkeypatch):
    monkeypatch.setattr(client, "REACH_SECONDS", 0.5)
    cloud.fault = lambda method, path, query: 503
    with pytest.raises(BucketError, match=f"^{RUN}: the bucket does not answer"):
        places.reach(RUN)


def test_a_bucket_that_is_busy_is_asked_again(cloud):
    run = opened()
    write(run, config="c")
    left = [503, 429]
    cloud.fault = lambda method, path, query: left.pop() if left else None
    places.push(str(run))
    assert cloud.below("runs/a/") == {"config": b"c"}


def test_what_cannot_be_written_beside_a_step_is_written_with_the_next(cloud):
    run = opened()
    write(run, config="c")
    cloud.fault = lambda method, path, query: 403
    places.push(str(run), wait=False)
    places._copies[0]._soon.result()
    cloud.fault = lambda *request: None
    places.push(str(run), wait=False)
    places._copies[0]._soon.result()
    assert cloud.below("runs/a/") == {"config": b"c"}


def test_one_process_of_a_machine_writes_to_a_place(cloud):
    opened()
    code = f"from mmrecoder_jax import places; places.local({RUN!r}, 0)"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "another process of this machine works there" in other.stderr


def test_hosts_share_a_place(cloud):
    first, second = opened(), Path(places.local(RUN, 1))
    assert first != second
    write(first, data__x="1")
    write(second, judge__1="j")
    places.push(str(first))
    places.refill(str(second))
    assert names(second) == ["data/x", "judge/1"]
    assert sorted(cloud.below("runs/a/")) == ["data/x", "judge/1"]


def test_hosts_write_to_one_new_directory(cloud):
    """The main process marks it; what another one has removed already is gone."""
    first, second = opened(), Path(places.local(RUN, 1))
    write(second, trajectories__b="2")
    places.push(str(second))
    assert not [path for _, path in cloud.requests if ".uploading" in path]
    write(first, trajectories__a="1", old="o")
    places.push(str(first))
    assert cloud.below("runs/a/") == {"trajectories/a": b"1", "trajectories/b": b"2", "old": b"o"}
    places.refill(str(second))
    for run in (first, second):
        (run / "old").unlink()
        places.push(str(run))
    assert names(second) == ["trajectories/a", "trajectories/b"]
    assert sorted(cloud.below("runs/a/")) == names(second)


@pytest.mark.parametrize("again", [True, False], ids=["refilled", "opened"])
def test_what_the_main_process_is_writing_is_left_to_it(cloud, again):
    opened()
    second = Path(places.local(RUN, 1)) if again else None
    cloud.store("bucket", "runs/a/trajectories/.uploading", b"")
    cloud.store("bucket", "runs/a/trajectories/1", b"1")
    cloud.store("bucket", "runs/a/config.json", b"{}")
    if second is None:
        second = Path(places.local(RUN, 1))
    else:
        places.refill(str(second))
    assert names(second) == ["config.json"]
    assert len(cloud.below("runs/a/")) == 3, "another process's files were removed"


def test_nothing_is_written_while_a_folder_is_filled(cloud):
    """A push beside it would take what is not there yet for removed."""
    run = opened()
    write(run, one="1", two="2")
    places.push(str(run))
    (copy,) = places._copies
    soon = threading.Event()

    def pushed_meanwhile(method, path, query):
        if method == "GET" and not soon.is_set():
            soon.set()
            (run / "one").unlink()
            copy.push_soon()
            time.sleep(0.3)

    cloud.fault = pushed_meanwhile
    copy.fill()
    cloud.fault = lambda *request: None
    assert soon.is_set() and names(run) == ["one", "two"]
    copy._soon.result()
    assert sorted(cloud.below("runs/a/")) == ["one", "two"]


def test_marks_go_after_what_they_mark(cloud):
    """Another process that lists meanwhile takes nothing of it for whole."""
    for name in (".uploading", "-1", "1", "deep/x"):
        cloud.store("bucket", f"runs/a/data/{name}", b"1")
    opened()
    gone = [path for method, path in cloud.requests if method == "DELETE"]
    assert len(gone) == 4 and gone[-1].endswith(".uploading")


def test_what_another_host_changes_while_it_is_read_is_read_again(cloud):
    cloud.store("bucket", "runs/a/metrics.jsonl", b"one")
    left = [404, 404]
    cloud.fault = lambda method, path, query: (
        left.pop() if left and path.endswith("metrics.jsonl") else None
    )
    assert (opened() / "metrics.jsonl").read_text() == "one" and not left


def test_a_damaged_checkpoint_keeps_its_files_under_another_name(cloud):
    run = opened()
    cloud.store("bucket", "runs/a/checkpoints/3/params/x", b"p")
    cloud.store("bucket", "runs/a/checkpoints/3/commit_success.txt", b"")
    path = places.checkpoints(str(run))
    assert places.steps(str(run)) == [3]
    places.rename_checkpoint(path / "3", path / "damaged-3")
    assert places.steps(str(run)) == []
    assert sorted(cloud.below("runs/a/checkpoints/")) == [
        "damaged-3/commit_success.txt",
        "damaged-3/params/x",
    ]


def test_an_error_that_ends_the_work_is_not_hidden(cloud):
    run = opened()
    with pytest.raises(SystemExit), places.pushed(str(run)):
        write(run, config="c")
        raise SystemExit(75)
    assert cloud.below("runs/a/") == {"config": b"c"}
    with pytest.raises(SystemExit), places.pushed(str(run)):
        write(run, config="cc")
        cloud.fault = lambda method, path, query: 403
        raise SystemExit(75)
    with pytest.raises(BucketError), places.pushed(str(run)):
        pass
