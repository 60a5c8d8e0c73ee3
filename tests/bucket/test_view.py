"""Work directories in a bucket that are looked at while a run may go on: what is fetched, what is
written, and the commands that do so.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from mmrecoder_jax import places, report, watch
from mmrecoder_jax.places import BucketError
from mmrecoder_jax.reporting import server
from mmrecoder_jax.reporting.report import Report
from mmrecoder_jax.reporting.server import Live
from tests.reporting.fake_run import fake_run

RUN = "gs://bucket/runs/a"


def store(cloud, **files):
    for name, content in files.items():
        cloud.store("bucket", f"runs/a/{name.replace('__', '/')}", content.encode())


def viewed(**options):
    return Path(places.view(RUN, "test", **options))


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def upload(cloud, folder, below):
    for path in folder.rglob("*"):
        if path.is_file():
            name = f"{below}/{path.relative_to(folder).as_posix()}"
            cloud.store("bucket", name, path.read_bytes())


@pytest.fixture
def said(monkeypatch, capsys):
    """`said(main, *arguments)`: what a command prints; its status where it is not 0."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["", *arguments])
        try:
            main()
        except SystemExit as ended:
            return ended.code
        return capsys.readouterr().out

    return run


def test_pictures_charts_and_checkpoints_stay_until_they_are_asked_for(cloud):
    cloud.store("bucket", "runs/a/trajectories/renders/ab.png", b"picture")
    cloud.store("bucket", "runs/a/data/train/charts.jsonl", b"chart")
    store(cloud, config="c", checkpoints__3__params="p", trajectories__1="rows")
    run = viewed()
    assert names(run) == ["config", "trajectories/1"]
    picture = run / "trajectories" / "renders" / "ab.png"
    assert Path(places.bring(picture)).read_bytes() == b"picture"
    charts = Path(places.bring(run / "data"))
    assert names(charts) == ["train/charts.jsonl"] and not charts.is_relative_to(run)
    assert not Path(places.bring(run / "none.png")).exists()
    store(cloud, config="d")
    places.refill(str(run))
    assert picture.exists() and (run / "config").read_text() == "d"
    assert places.shown(f"at {picture}") == f"at {RUN}/trajectories/renders/ab.png"


def test_local_folders_are_as_they_are(tmp_path):
    path = str(tmp_path)
    assert places.view(path, "test") == path and places.bring(path) == path
    places.put(path)
    assert places.of_machine(tmp_path) == tmp_path and not places.in_bucket(path)


def test_a_run_that_goes_is_followed(cloud):
    store(cloud, metrics="one", gone="x", data__uploading="x")
    cloud.store("bucket", "runs/a/stage2/.uploading", b"")
    store(cloud, stage2__half="x")
    run = viewed()
    assert names(run) == ["gone", "metrics"]
    del cloud.objects["bucket"]["runs/a/gone"]
    del cloud.objects["bucket"]["runs/a/stage2/.uploading"]
    store(cloud, metrics="one two")
    (run / places.RUNS).mkdir()
    (run / places.RUNS / "log").write_text("of this machine")
    cloud.requests.clear()
    places.refill(str(run))
    assert names(run) == [f"{places.RUNS}/log", "metrics", "stage2/half"]
    assert (run / "metrics").read_text() == "one two"
    assert {method for method, _ in cloud.requests} == {"GET"}
    cloud.requests.clear()
    places.refill(str(run))
    assert len(cloud.requests) == 1  # nothing has changed


def test_what_is_written_or_removed_while_it_is_read_is_read_again(cloud):
    store(cloud, metrics="one")
    left = [404, 404]
    cloud.fault = lambda method, path, query: (
        left.pop() if left and path.endswith("metrics") else None
    )
    assert (viewed() / "metrics").read_text() == "one" and not left
    store(cloud, metrics="two")
    cloud.fault = lambda method, path, query: 404 if path.endswith("metrics") else None
    with pytest.raises(BucketError, match=f"^{RUN}: there is no such bucket, or it lost"):
        places.refill(str(places._copies[0].folder))


def test_only_what_is_named_is_written(cloud):
    store(cloud, report__old="o", report__same="s", other="x")
    cloud.store("bucket", "runs/a/report/somebodys.png", b"picture")
    cloud.store("bucket", "runs/a/m.jsonl", b"ab")
    cloud.store("bucket", "runs/a/m.jsonl.parts/000000000002", b"cd")
    run = viewed()
    assert (run / "m.jsonl").read_bytes() == b"abcd"
    (run / "report" / "old").unlink()
    (run / "report" / "deep").mkdir()
    (run / "report" / "deep" / "new").write_text("n")
    (run / "page").write_text("p")
    (run / "other").write_text("changed here")
    places.put(run / "report")
    places.put(run / "page")
    places.push(str(run))
    assert cloud.below("runs/a/") == {
        "m.jsonl": b"ab",
        "m.jsonl.parts/000000000002": b"cd",
        "other": b"x",
        "page": b"p",
        "report/deep/new": b"n",
        "report/same": b"s",
        "report/somebodys.png": b"picture",
    }


def test_nothing_in_the_bucket_is_an_error_unless_it_is_new(cloud):
    with pytest.raises(BucketError, match=f"^{RUN}: there is nothing in the bucket"):
        viewed()
    run = viewed(new=True)
    (run / "table").write_text("t")
    places.put(run / "table")
    assert cloud.below("runs/a/") == {"table": b"t"}


@pytest.mark.parametrize("alone", [False, True])
def test_a_command_that_writes_has_its_folder_alone(cloud, alone):
    store(cloud, config="c")
    run = viewed(alone=alone)
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    words = [sys.executable, "-c", code, str(run.parent / ".lock")]
    other = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ("BlockingIOError" in other.stderr) == alone


def test_a_report_is_written_beside_the_run(cloud, tmp_path, said, monkeypatch):
    run = fake_run(tmp_path / "run", steps=1)
    upload(cloud, run, "runs/a")
    before = cloud.below("runs/a/")
    assert said(report.main, f"--workdir={RUN}", "--trajectories=20") == (
        f"report: {RUN}/report.html\n"
    )
    after = cloud.below("runs/a/")
    assert RUN.encode() in after["report.html"]
    assert str(tmp_path).encode() not in after["report.html"]
    written = {name for name in after if name not in before}
    assert "report.html" in written and len(written) == 5  # of two files a list and details each
    assert {name: after[name] for name in before} == before
    one = tmp_path / "mail.html"
    monkeypatch.setattr(places, "_copies", [])
    monkeypatch.setenv(places.HOME, str(tmp_path / "elsewhere"))
    assert said(report.main, f"--workdir={RUN}", f"--one_file={one}") == f"report: {one}\n"
    assert said(report.main, f"--workdir={run}", f"--one_file={tmp_path / 'b'}")
    pictures = one.read_text().count("data:image/png")
    assert pictures and pictures == (tmp_path / "b").read_text().count("data:image/png")


def test_the_report_of_a_run_names_its_address(cloud):
    run = places.local(RUN, 0)
    assert Report(run).shown_as == RUN
    assert Report(f"{run}/stage2").shown_as == f"{RUN}/stage2"


def test_a_run_is_watched(cloud, tmp_path, monkeypatch):
    run = fake_run(tmp_path / "run", steps=1)
    upload(cloud, run, "runs/a")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv(places.HOME, str(tmp_path / "link"))
    live = Live(viewed())
    (picture, *_) = run.rglob("stage2/trajectories/renders/**/*.png")
    name = picture.relative_to(run).as_posix()
    assert live.picture(name) == picture.read_bytes()
    assert live.picture("stage2/none.png") is None
    before = live.data("now")
    rows = (run / "stage2" / "metrics.jsonl").read_bytes()
    cloud.store("bucket", "runs/a/stage2/metrics.jsonl", rows + rows.splitlines(True)[-1])
    cloud.requests.clear()
    assert live.data("now") == before and not cloud.requests
    monkeypatch.setattr(server, "BUCKET_SECONDS", 0.0)
    assert live.data("now") != before


def test_watching_says_the_address(cloud, tmp_path, said, monkeypatch):
    upload(cloud, fake_run(tmp_path / "run", steps=1), "runs/a")
    pages = []
    monkeypatch.setattr(
        server.Server, "serve_forever", lambda serving: pages.append(serving.live.page())
    )
    line = said(watch.main, f"--workdir={RUN}", "--port=0")
    assert line.startswith(f"watching {RUN} at http://127.0.0.1:")
    assert RUN in pages[0] and str(tmp_path) not in pages[0]


@pytest.mark.parametrize("main", [report.main, watch.main])
def test_what_is_not_there_is_one_line(cloud, said, main):
    line = said(main, "--workdir=gs://bucket/none")
    assert line.startswith("error: gs://bucket/none: there is nothing in the bucket")
