"""The pages have no mistake that the script finds, and it finds the mistakes that pages make."""

import sys

import pytest

from tests.scripts.run import ROOT, run_script

sys.path.insert(0, str(ROOT / "scripts"))
import check_docs

sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.parametrize("page", check_docs.PAGES, ids=lambda page: page.name)
def test_everything_that_a_page_says_to_type_exists(page):
    assert [str(mistake) for mistake in check_docs.check_page(page)] == []


def found(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return [str(mistake) for mistake in check_docs.check_page(page)]


TRAIN = "python -m mmrecoder_jax.train --workdir=W"


@pytest.mark.parametrize(
    "command, said",
    [
        ("python -m mmrecoder_jax.trian --workdir=W", "no such module: mmrecoder_jax.trian"),
        (f"{TRAIN} --config=stage3", "did you mean --config=stage2"),
        (f"{TRAIN} --config=configs/stage2.py:huge", "no size huge"),
        (f"{TRAIN} --config=stage2 --config.optim.lrr=1", "has no field optim.lrr"),
        (f"{TRAIN} --config=sft_chart2code --config.rl.group=8", "has no field rl.group"),
        (f"{TRAIN} --config=evaluate", "does not run it"),
        (f"{TRAIN} --selfchek", "has no flag --selfchek"),
        ("python -m mmrecoder_jax.env.score --pair x", "has no flag --pair"),
        ("python -m mmrecoder_jax.import_charts --config.optim.lr=1", "has no flag --config.optim"),
        ("python scripts/nothing.py", "no such file: scripts/nothing.py"),
        ("python scripts/faults.py --ony sigkill", "has no flag --ony"),
        ("python scripts/faults.py --config.optim.lr=1", "has no flag --config.optim.lr"),
        ("python scripts/table2.py --config.optim.lrr=1", "has a field optim.lrr"),
        ("python scripts/sweep.py --config=stage2 --sweep=config.rl.eta=0,1", "no field rl.eta"),
        ("scripts/tpu_vm.sh run N --spt --workdir=W -- --config=stage2", "has no flag --spt"),
        ("scripts/tpu_vm.sh run N --workdir=W -- --config=stage3", "did you mean --config=stage2"),
        ("pip install -e '.[tests]'", "no such extra: tests"),
        ("pytest tests/rl/test_loses.py", "no such test: tests/rl/test_loses.py"),
        ("gcloud tpu ssh N --command='cd x && python -m mmrecoder_jax.trian'", "no such module"),
        ("cd x && .venv/bin/python -m tests.models.refrence", "no such module: tests.models.ref"),
    ],
)
def test_a_mistyped_command_is_found_in_a_block_and_in_the_text(tmp_path, command, said):
    (in_list,) = found(tmp_path, f"1. Do\n\n    ```\n    {command}\n    ```\n")
    assert said in in_list
    (in_block,) = found(tmp_path, f"# Head\n\n```\n{command}\n```\n")
    assert in_block.startswith("page.md:4: ") and said in in_block
    if "'" not in command:
        (in_text,) = found(tmp_path, f"Run\n`{command}` now.\n")
        assert in_text.startswith("page.md:2: ") and said in in_text


@pytest.mark.parametrize(
    "text",
    [
        f"```\n{TRAIN} --config=FILE[:SIZE] --config.optim.lr=1e-5 ...   # a comment\n```",
        f"```\n$ {TRAIN} \\\n    --config=stage2:tiny --profile=3\n```",
        "```\nPYTHONPATH=. python scripts/faults.py --only sigkill | tee log\n```",
        "```\nscripts/tpu_vm.sh run N --spot -- --config=stage2 --config.rl.group=4\n```",
        "```\npython scripts/sweep.py --config=stage2 --sweep=config.reward.eta=0,1\n```",
        "```\npython: this is output, --and so is this\n```",
        "`--config.lora.rank=16` and `--selfcheck`; `python script.py`",
        "```python\nfrom mmrecoder_jax.data.benchmarks import import_charts\n```",
    ],
)
def test_what_is_right_is_not_called_wrong(tmp_path, text):
    assert found(tmp_path, text) == []


@pytest.mark.parametrize(
    "text, said",
    [
        ("`--config.lora.rnak=16`", "no configuration has a field lora.rnak"),
        ("`--selfchek`", "no program has a flag --selfchek"),
        ("[a](nowhere.md)", "no such file: nowhere.md"),
        ("# One\n[a](#two)", "no such heading: #two"),
        ("```python\nx = (\n```", "Python: "),
        ("```python\nfrom mmrecoder_jax.rl.loses import x\n```", "no such module"),
        ("```python\nfrom mmrecoder_jax.rl.losses import y_loss\n```", "losses has no y_loss"),
    ],
)
def test_other_mistakes_are_found(tmp_path, text, said):
    (mistake,) = found(tmp_path, text)
    assert said in mistake


def test_headings_are_found_by_their_anchor(tmp_path):
    assert (
        found(tmp_path, "## A `run` - or two\n[a](#a-run-or-two) [b](page.md#a-run-or-two)") == []
    )


def test_a_page_of_the_site_links_inside_the_site(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "x.py").write_text("")
    (mistake,) = found(docs, "[a](../x.py)")
    assert "outside docs/" in mistake


@pytest.mark.slow
def test_the_programs_themselves_name_every_flag():
    done = run_script("check_docs", "--run", seconds=900)
    assert done.returncode == 0, done.stdout
    assert "all commands and links exist" in done.stdout
