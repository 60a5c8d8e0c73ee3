from tests.scripts.run import ROOT, run_script


def test_the_page_is_what_the_reports_say(tmp_path):
    """No minutes: nothing is compiled, the page is written from the JSON lines."""
    page = tmp_path / "memory.md"
    done = run_script(
        "memory_table", f"--jsonl={ROOT / 'docs/memory.jsonl'}", f"--page={page}", "--minutes=0"
    )
    assert done.returncode == 0, done.stderr
    assert page.read_text("utf-8") == (ROOT / "docs/memory.md").read_text("utf-8")
