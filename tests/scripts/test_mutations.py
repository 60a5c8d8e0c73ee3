"""The mutation check on a project of two files, and whether its table still fits ours."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "mutations.py"
TESTS = ("tests/test_area.py",)
# One function with a check and an option; the option `unit` has no test.
AREA = """def area(width, height, unit=1):
    if width < 0:
        raise ValueError(width)
    return width * height * unit
"""
TEST = """import pytest
from area import area

def test_area():
    assert area(2, 3) == 6

def test_negative():
    with pytest.raises(ValueError):
        area(-1, 3)
"""


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def project(tmp_path):
    (tmp_path / "project" / "tests").mkdir(parents=True)
    (tmp_path / "project" / "area.py").write_text(AREA)
    (tmp_path / "project" / "tests" / "test_area.py").write_text(TEST)
    (tmp_path / "project" / "runs").mkdir()
    return tmp_path / "project"


def test_a_caught_and_a_surviving_mutation(script, project, capsys):
    mutations = script["of_file"](
        "area.py",
        TESTS,
        ("check", "if width < 0:", "if False:"),
        ("product", "width * height", "width + height"),
        ("unit", " * unit", ""),
    )
    assert script["check"](mutations, project) == 1
    check, product, unit, total = capsys.readouterr().out.splitlines()
    assert check.startswith("check   | tests/test_area.py::test_negative | ")
    assert product.startswith("product | tests/test_area.py::test_area | ")
    assert unit.startswith("unit    | SURVIVED | ")
    assert total == "3 mutations, 1 not caught"
    assert (project / "area.py").read_text() == AREA


def test_a_mutation_that_breaks_the_file_is_not_caught_by_a_test(script, project, capsys):
    mutations = script["of_file"]("area.py", TESTS, ("syntax", "return", "retrun"))
    assert script["check"](mutations, project) == 1
    assert "syntax | NO TEST RAN" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, old, message",
    [
        ("area.py", "height > 0", "holds the old text 0 times"),
        ("area.py", "width", "holds the old text 4 times"),
        ("volume.py", "width", "there is no file volume.py"),
    ],
)
def test_a_stale_table(script, project, file, old, message):
    mutations = script["of_file"](file, TESTS, ("stale", old, "1"))
    with pytest.raises(script["StaleTable"], match=f"stale: .*{message}"):
        script["check"](mutations, project)


def test_tests_that_fail_anyway_prove_nothing(script, project):
    (project / "tests" / "test_area.py").write_text(TEST.replace("== 6", "== 7"))
    mutations = script["of_file"]("area.py", TESTS, ("check", "if width < 0:", "if False:"))
    with pytest.raises(script["StaleTable"], match="fail without a mutation"):
        script["check"](mutations, project)


def test_tests_that_take_too_long_prove_nothing(script, project, monkeypatch):
    monkeypatch.setitem(script["check"].__globals__, "SECONDS", 0.01)
    mutations = script["of_file"]("area.py", TESTS, ("check", "if width < 0:", "if False:"))
    with pytest.raises(script["StaleTable"], match=r"take longer than 0\.01 s"):
        script["check"](mutations, project)


def test_our_table_fits_our_code(script):
    names = [mutation.name for mutation in script["MUTATIONS"]]
    assert len(set(names)) == len(names)
    for mutation in script["MUTATIONS"]:
        count = (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old)
        assert count == 1, f"{mutation.name}: {mutation.file} holds {mutation.old!r} {count} times"
        for test in mutation.tests:
            assert (ROOT / test.partition("::")[0]).is_file(), f"{mutation.name}: no {test}"


def test_commands():
    listed = subprocess.run(
        [sys.executable, SCRIPT, "--list", "--only", "optim.b1", "rl.clip_low"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line.split(" | ")[0] for line in listed.stdout.splitlines()]
    assert {"rl.clip_low", "optim.b1"} <= set(names)
    assert all("rl.clip_low" in name or "optim.b1" in name for name in names)
    unknown = subprocess.run(
        [sys.executable, SCRIPT, "--only", "xyz"], capture_output=True, text=True, check=False
    )
    assert unknown.returncode == 2 and "--list prints their names" in unknown.stderr
