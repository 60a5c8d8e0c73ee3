"""The command line: flags that are wrong, a process that is killed and resumed, comparisons."""

import json
import signal
import subprocess
import sys
import time

import pytest

from mmrecoder_jax.data import panels
from mmrecoder_jax.data.build import build_synthetic
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.response import response_text
from mmrecoder_jax.exam.command import main
from mmrecoder_jax.exam.journal import PREDICTIONS
from mmrecoder_jax.exam.run import LATEX, MARKDOWN, RESULTS
from tests.drawing.test_server import answers as answering

COUNT = 6


def refused(capsys, *arguments):
    """What a command that must not start says."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = str(ended.value)
    assert said.startswith("error: ") and "\n" not in said
    return said


@pytest.fixture(scope="module")
def charts(tmp_path_factory, pool):
    directory = tmp_path_factory.mktemp("charts") / "test"
    build_synthetic(directory, "test", COUNT, 0, pool)
    return directory


@pytest.fixture(scope="module")
def answers(charts):
    """Two turns per chart: another title, then the truth; one chart has no answer."""
    rows = [json.loads(line) for line in (charts / "charts.jsonl").read_text().splitlines()]
    path = charts.parent / "answers.jsonl"
    with open(path, "w") as file:
        for row in rows[:-1]:
            wrong = row["code"].replace("set_title(", "set_title('Not ' + ")
            turns = [response_text("x", wrong), response_text("Fix text.", row["code"])]
            file.write(json.dumps({"id": row["id"], "turns": turns}) + "\n")
        file.write(json.dumps({"id": "nobody", "text": "x"}) + "\n")
    return path


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--benchmrak=tiny"],
            "unrecognized arguments: --benchmrak=tiny; did you mean --benchmark",
        ),
        (["--benchmark=tine"], "invalid choice: 'tine'"),
        ([], "give --benchmark=NAME"),
        (["--benchmark=chartx"], "--benchmark=chartx needs --data"),
        (["--benchmark=tiny", "--turns=0"], "--turns=0: use 1 or more"),
        (["--benchmark=tiny", "--turns=two"], "invalid int value: 'two'"),
        (["--benchmark=tiny", "--temperature=-1"], "--temperature=-1.0: use 0"),
        (["--benchmark=tiny", "--samples=2", "--temperature=0"], "all samples would be equal"),
        (["--benchmark=tiny", "--task=edit"], "--task=edit: tiny has direct"),
        (["--benchmark=tiny", "--columns=image"], "'image' is not FIELD=COLUMN"),
        (["--benchmark=tiny", "--judge=http://h/v1"], "needs --judge-model=NAME"),
        (
            ["--benchmark=tiny", "--predictions=none.jsonl"],
            "--predictions=none.jsonl: no such file",
        ),
        (["--benchmark=tiny", f"--predictions={__file__}", "--turns=2"], "give no --turns"),
        (["--benchmark=tiny", "--checkpoint=nowhere"], "--checkpoint='nowhere': no such directory"),
        (["--benchmark=tiny", "--server=http://h/v1"], "needs --model=NAME"),
        (["--benchmark=tiny", "--out=gs://bucket/x"], "--out='gs://bucket/x': a local path"),
        (["--benchmark=tiny", "--python=/nowhere"], "--python='/nowhere' does not exist"),
        (["--compare", "a", "b", "--benchmark=tiny"], "give no --benchmark"),
        (["--compare", "a", "b"], "there is no run.json in it"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir()), "nothing was begun"


def flags(charts, answers, out):
    return [
        "--benchmark=tiny",
        f"--data={charts}",
        f"--predictions={answers}",
        f"--out={out}",
        "--workers=1",
        "--official",
        "--judge=visual",
    ]


@pytest.fixture(scope="module")
def whole(charts, answers, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert main(flags(charts, answers, out)) == 0
    return out


def test_predictions_of_others_are_scored(whole):
    results = json.loads((whole / RESULTS).read_text())
    assert results["author"] == "answers" and results["missing"] == 1
    assert set(results["rules"]) == {"repeatable", "code_pass", "no_filter"}
    second = results["rules"]["repeatable"][1]
    assert second["low"]["mean"] == pytest.approx((COUNT - 1) / COUNT)
    assert results["high"][1]["mean"] == pytest.approx((COUNT - 1) / COUNT)
    assert "high (visual)" in (whole / MARKDOWN).read_text()


def test_a_killed_process_goes_on_and_ends_with_the_same_files(charts, answers, whole, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mmrecoder_jax.evaluate", *flags(charts, answers, out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 240
        rows = 0
        while not rows and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
            rows = (
                (out / PREDICTIONS).read_bytes().count(b"\n") if (out / PREDICTIONS).exists() else 0
            )
        process.send_signal(signal.SIGKILL)
    written = (out / PREDICTIONS).read_bytes().count(b"\n")
    assert 0 < written < COUNT, process.stdout
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for name in (PREDICTIONS, RESULTS, MARKDOWN, LATEX):
        assert (out / name).read_text() == (whole / name).read_text()


def test_finished_runs_are_compared(charts, answers, whole, tmp_path, capsys):
    first = json.loads(answers.read_text().splitlines()[0])
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text(json.dumps(first) + "\n")
    other = tmp_path / "other"
    assert main(flags(charts, fewer, other)) == 0
    capsys.readouterr()
    assert main(["--compare", str(whole), str(other), f"--out={tmp_path / 'compared'}"]) == 0
    said = capsys.readouterr().out
    assert f"the {COUNT} charts that all of {COUNT}, {COUNT} have in common" in said
    assert "1: answers" in said and "2: fewer" in said
    found = json.loads((tmp_path / "compared/compare.json").read_text())
    gain = found["rows"][0]["differences"][0]
    assert gain["mean"] == pytest.approx(-(COUNT - 2) / COUNT)


def test_other_answers_in_the_same_place_are_refused(charts, answers, whole, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(answers.read_text().splitlines()[0] + "\n")
    said = refused(capsys, *flags(charts, other, whole))
    assert "holds the predictions of another run (predictions was " in said


def test_a_policy_of_another_grammar_is_refused(charts, tmp_path, capsys):
    work = tmp_path / "stage2"
    (work / "checkpoints").mkdir(parents=True)
    data = {"kind": "synthetic", "grammar": "panels"}
    (work / "config.json").write_text(json.dumps({"size": "smoke", "data": data}))
    flags = ("--benchmark=tiny", f"--data={charts}", f"--checkpoint={work}")
    said = refused(capsys, *flags, f"--out={tmp_path / 'out'}", "--workers=1")
    assert f"--data={charts}: these are charts of the grammar 'words'" in said
    assert "trained on 'panels': leave --data out" in said and not (tmp_path / "out").exists()


def test_answers_of_a_server_have_the_style_of_the_charts(tmp_path, monkeypatch):
    """Whichever their grammar is: the style of words has ticks, whose texts panels have not."""
    style = EnvConfig(workers=1, dpi=70, rc_params=panels.RC_PARAMS)
    with ExecutorPool(style) as pool:
        (chart,) = build_synthetic(tmp_path / "test", "test", 1, 0, pool, grammar="panels")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with answering(response_text("x", chart.code)) as server:
        arguments = [f"--data={tmp_path / 'test'}", f"--server={server.url}", "--model=m"]
        arguments += [f"--out={tmp_path / 'out'}", "--turns=1", "--workers=1"]
        assert main(["--benchmark=tiny", *arguments]) == 0
    (turn,) = json.loads((tmp_path / "out" / RESULTS).read_text())["rules"]["repeatable"]
    assert turn["text"]["mean"] == turn["low"]["mean"] == 1.0


def test_predictions_of_other_charts_are_refused(charts, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "bar_1", "text": "x"}\n')
    said = refused(capsys, *flags(charts, other, tmp_path / "out"))
    assert "none of its 1 ids is one of the 6 charts (such as 'test-000000')" in said
