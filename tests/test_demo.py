"""The page of the demo, in headless Chromium against a running server: a chart is dropped, turns
arrive, code is edited and run, visitors do not meet.
"""

import contextlib
import io
import re
import shutil
import subprocess
import sys
import threading

import pytest
from PIL import Image

from mmrecoder_jax import demo
from mmrecoder_jax.drawing.studio import Studio
from mmrecoder_jax.env.response import response_text
from tests.drawing.scripted import bars, turn

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 120
GREEN = "import matplotlib.pyplot as plt\nplt.bar([1], [2], color='green')\nplt.show()"


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"pip install 'mmrecoder_jax\[ui\]'"):
        demo.main([])


def test_a_port_that_is_none_is_refused():
    with pytest.raises(SystemExit, match="--port=99999: use 1 to 65535"):
        demo.main(["--port=99999"])


class Values:
    """What a page is given, without gradio."""

    @staticmethod
    def skip():
        return "same"

    @staticmethod
    def Radio(**shown):
        return [label for label, _ in shown["choices"]]


class Tells:
    """An author whose turn grows in three steps, the first of which holds no code."""

    name = "author"
    waits = ("<think>bar", response_text("bar", "x")[:-3], response_text("bar", "x = 1"))

    def answer(self, charts, **options):
        return iter(())

    def next(self, chart, before, *, temperature=0.0, seed=0, told=None):
        for text in self.waits:
            told(text)
            threading.Event().wait(0.1)
        return turn(5 * (len(before) + 1))


def test_code_is_shown_while_it_is_written(tmp_path, pool):
    picture = tmp_path / "chart.png"
    picture.write_bytes(CHART)
    view = demo._View(Studio(Tells(), pool, "Redraw."), Values)
    shown = list(view.draw(str(picture), 2, 0.0))
    codes, notes = [one[2] for one in shown], [one[5] for one in shown]
    assert codes[:4] == ["", "", "x\n", "x = 1\n"] and len(shown) == 10
    assert notes[1] == "turn 1 is being written ...\nbar"
    # the pictures of the turn before stay until the next ones are there
    assert all(one[3] == one[4] == "same" for one in shown[1:4] + shown[6:9])
    assert shown[5][3] is not None and len(shown[9][1]) == 2
    (*_, last) = view.more(shown[9][0], codes[9], 0.0)
    assert len(last[0].steps) == 3


@pytest.fixture(scope="module")
def address():
    """Of a running demo with the policy in the box."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "mmrecoder_jax.demo", "--port=0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        timer = threading.Timer(SECONDS, server.kill)
        timer.start()
        line = server.stdout.readline()
        timer.cancel()
        found = re.search(r"draws at (http://127\.0\.0\.1:\d+/)", line)
        assert found, line + server.stderr.read()
        yield found.group(1)
        server.send_signal(2)
        assert server.wait(60) == 0


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def visit(browser, address):
    """A visitor of their own; whatever the page asks of other hosts, or says of errors, fails."""
    context = browser.new_context()
    page = context.new_page()
    outside, problems = [], []
    page.on("request", lambda r: outside.append(r.url) if is_outside(r.url) else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.set_default_timeout(1000 * SECONDS)
    page.wait_for_selector("#draw")
    yield page
    assert problems == [] and outside == []
    context.close()


def is_outside(url):
    return not url.startswith(("http://127.0.0.1", "data:", "blob:"))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def drop(page, data, name="chart.png"):
    page.set_input_files(
        "#chart input[type=file]", {"name": name, "mimeType": "image/png", "buffer": data}
    )
    page.wait_for_selector("#chart img")


def note(page, words):
    """Waits for words in the note."""
    page.wait_for_function(
        "words => document.querySelector('#note textarea').value.includes(words)", arg=words
    )
    return page.input_value("#note textarea")


def write(page, code):
    page.click("#code .cm-content")
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(code)


def steps(page):
    return page.eval_on_selector_all("#steps label", "found => found.map(one => one.innerText)")


def wait_for_steps(page, count):
    page.wait_for_function(
        "count => document.querySelectorAll('#steps label').length === count", arg=count
    )
    return steps(page)


CHART = png(Image.fromarray(bars(20)))
# Writes down (turns, code) whenever the page changes.
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => window.seen.push([
    document.querySelectorAll('#steps label').length,
    document.querySelector('#code .cm-content').innerText,
  ])).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@pytest.mark.slow
def test_two_turns_then_code_of_ones_own_then_another_turn(browser, address):
    with visit(browser, address) as page:
        page.click("#draw")
        note(page, "Drop or paste a chart first")
        drop(page, CHART)
        page.evaluate(WATCH)
        page.click("#draw")
        assert all(
            step.startswith(f"{number}. the policy in the box")
            for number, step in enumerate(wait_for_steps(page, 2), 1)
        )
        page.wait_for_selector("#code .cm-line")
        assert "import matplotlib" in page.inner_text("#code .cm-content")
        seen = page.evaluate("() => window.seen")  # the code grew before the first turn was there
        assert len({text for count, text in seen if count == 0 and text.strip()}) > 1
        write(page, GREEN)
        page.click("#run")
        assert wait_for_steps(page, 3)[2].startswith("3. you: likeness 0.")
        for name in ("render", "difference"):
            page.wait_for_selector(f"#{name} img")
        page.click("#more")
        assert wait_for_steps(page, 4)[3].startswith("4. the policy in the box")
        page.click("#steps label:nth-of-type(3)")
        page.wait_for_function(
            "() => document.querySelector('#code .cm-content').innerText.includes('green')"
        )


@pytest.mark.slow
def test_a_hostile_script_harms_neither_host_nor_page(browser, address, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    hostile = (
        f"import pathlib\npathlib.Path({str(secret)!r}).write_text('gone')\n"
        "raise SystemExit('<img src=x onerror=document.title=1>')"
    )
    with visit(browser, address) as page:
        drop(page, CHART)
        page.click("#draw")
        wait_for_steps(page, 2)
        write(page, hostile)
        page.click("#run")
        assert wait_for_steps(page, 3)[2].startswith("3. you: ")
        assert secret.read_text() == "mine"
        write(page, "raise ValueError('<img src=x onerror=document.title=1>')")
        page.click("#run")
        wait_for_steps(page, 4)
        assert "<img src=x" in note(page, "ValueError")
        assert page.title() == "MM-ReCoder"
        assert page.query_selector("img[src=x]") is None
        write(page, "while True: pass")
        page.click("#run")
        note(page, "CPU time")


@pytest.mark.slow
def test_visitors_do_not_meet(browser, address):
    with visit(browser, address) as one, visit(browser, address) as other:
        for page, height in ((one, 12), (other, 30)):
            drop(page, png(Image.fromarray(bars(height))))
        one.click("#draw")
        other.click("#draw")
        assert len(wait_for_steps(one, 2)) == len(wait_for_steps(other, 2)) == 2
        write(one, GREEN)
        one.click("#run")
        wait_for_steps(one, 3)
        assert len(steps(other)) == 2
        assert "green" not in other.inner_text("#code .cm-content")


@pytest.mark.slow
def test_pictures_that_cannot_be_read_are_refused_in_words(browser, address):
    with visit(browser, address) as page:
        drop(page, png(Image.new("1", (10000, 10000))), "huge.png")
        page.click("#draw")
        assert "10000 x 10000 pixels are more than" in note(page, "cannot be read")
        assert steps(page) == []


def test_an_author_that_is_none_is_refused():
    pytest.importorskip("gradio")
    with pytest.raises(SystemExit, match="--checkpoint='nowhere': no such directory"):
        demo.main(["--checkpoint=nowhere"])
