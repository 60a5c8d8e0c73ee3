"""The page in a real browser: from file://, by keyboard, on a phone, in the dark, and live."""

import threading

import pytest

from mmrecoder_jax.reporting.report import write_one_file, write_report
from mmrecoder_jax.reporting.server import Live, Server
from tests.browser import Browser, needs_browser
from tests.reporting.fake_run import Maker, alarm, fake_run

pytestmark = needs_browser
READY = "document.body.dataset.ready"
CARDS = "[...document.querySelectorAll('.card')]"
NUMBERS = f"{CARDS}.map(x => x.querySelector('.number').textContent.replace('\\u2212', '-'))"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 24 + 64 trajectories with its report, in a directory whose name needs quoting."""
    run = fake_run(tmp_path_factory.mktemp("runs") / "a run #1", steps=4)
    write_report(run)
    return run


@pytest.fixture
def page(browser, run):
    page = browser.open((run / "report.html").as_uri())
    page.wait(READY)
    return page


def count(page):
    return page.js("document.getElementById('count').textContent")


def choose(page, name, value):
    page.js(
        f"(() => {{const e = document.getElementById('{name}'); e.value = '{value}';"
        "e.dispatchEvent(new Event('change'))})()"
    )


def loaded(page, where):
    """How many pictures are there, once all of them have been read."""
    pictures = f"[...document.querySelectorAll('{where} img')]"
    page.js(f"{pictures}.forEach(x => x.loading = 'eager')")
    page.wait(f"{pictures}.every(x => x.complete)")
    assert page.js(f"{pictures}.every(x => x.naturalWidth > 0)")
    return page.js(f"{pictures}.length")


def test_a_page_of_files_lists_all_trajectories_with_their_pictures(page):
    assert count(page) == "88 trajectories"
    assert page.js(f"{CARDS}.length") == 24
    assert loaded(page, "#list") >= 40
    assert page.problems() == []
    assert all(url.startswith(("file:", "data:", "about:")) for url in page.requests())


def test_filters_count_and_combine(page):
    page.click("#filters [data-show='failed']")
    failed = int(count(page).split(" of ")[0])
    assert 0 < failed < 88
    page.click("#filters [data-show='regressed']")
    both = int(count(page).split(" of ")[0])
    assert 0 < both < failed
    tags = page.js(f"{CARDS}.map(x => [...x.querySelectorAll('.tag')].map(t => t.textContent))")
    assert all({"failed", "regressed"} <= set(labels) for labels in tags)
    page.click("#filters [data-show='failed']")
    page.click("#filters [data-show='regressed']")
    assert count(page) == "88 trajectories"


def test_sorting(page):
    choose(page, "sort", "improvement, lowest")
    gains = [float(x.replace("±", "")) for x in page.js(NUMBERS)]
    assert gains == sorted(gains) and gains[0] < gains[-1]
    choose(page, "sort", "improvement, highest")
    gains = [float(x.replace("±", "")) for x in page.js(NUMBERS)]
    assert gains == sorted(gains, reverse=True)
    choose(page, "sort", "rule and judge apart")
    groups = page.js(f"{CARDS}.map(x => x.querySelector('.soft').textContent)")
    assert all("step" in text for text in groups)  # evaluations have no judge: they come last


def test_a_group_and_a_search(page):
    choose(page, "group", "stage1, test-greedy")
    assert count(page) == "12 of 88 trajectories"
    choose(page, "group", "")
    page.js("document.getElementById('search').focus()")
    page.write("test-0003")
    assert count(page) == "2 of 88 trajectories"
    page.js("document.getElementById('search').value = ''")
    page.write("nameerror step 4")
    found = int(count(page).split(" of ")[0])
    assert 0 < found < 16


def test_searching_code_reads_all_of_it(page):
    page.js("document.getElementById('search').focus()")
    page.write("gold")
    assert count(page) == "0 of 88 trajectories"
    page.click("#deep")
    page.wait("!document.getElementById('count').textContent.startsWith('0 ')")
    assert 10 < int(count(page).split(" of ")[0]) < 60


def test_the_keyboard_alone(page):
    page.press("n")
    assert page.js("document.getElementById('place').textContent") == "page 2 of 4"
    page.press("p")
    page.press("j")
    page.press("j")
    assert page.js("document.activeElement.dataset.place") == "1"
    page.press("k")
    page.press("Enter")
    page.wait("document.querySelector('#one[open] .turns')")
    first = page.js("document.getElementById('one-title').textContent")
    page.press("j")
    page.wait(f"document.getElementById('one-title').textContent !== {first!r}")
    assert page.js("location.hash").startswith("#stage2/evaluation/test-greedy/0/")
    page.press("Escape")
    page.wait("!document.getElementById('one').open")
    page.wait("document.activeElement.dataset.place === '1'")
    page.press("/")
    assert page.js("document.activeElement.id") == "search"
    page.press("j")  # a letter of a search now
    assert page.js("document.getElementById('search').value") == "j"


def opened(browser, run, name):
    """A page that was opened at a trajectory."""
    page = browser.open((run / "report.html").as_uri() + f"#{name}")
    page.wait("document.querySelector('#one[open] .turns')")
    return page


def test_a_trajectory_has_its_pictures_diff_thought_bars_and_tokens(browser, run):
    page = opened(browser, run, "stage2/trajectories/3/1")
    assert loaded(page, "#one .pictures") == 7  # target, two renders, two differences of two
    second = "document.querySelector('.difference img + img')"
    assert page.js(f"getComputedStyle({second}).mixBlendMode") == "difference"
    text = page.js("document.getElementById('one-body').innerText")
    assert "advantage" in text and "improvement" in text
    assert "--id=stage2/trajectories/3/1" in text
    marks = page.js(
        "[...document.querySelectorAll('#one .turns > div')].map(turn =>"
        "[...turn.querySelectorAll('.code span')].map(x => x.dataset.mark).join(''))"
    )
    assert set(marks[0]) == {" "} and marks[1].count("+") == marks[1].count("-") == 1
    names = page.js("[...document.querySelectorAll('#one .bars > span')].map(x => x.textContent)")
    assert {"reward", "format", "rule", "judge", "· text", "· color"} <= set(names)
    assert not page.js("document.querySelector('#one .thought').checkVisibility()")
    page.js("document.querySelectorAll('#one details').forEach(x => x.open = true)")
    page.wait("document.querySelectorAll('#one .tokens span').length === 80")
    assert "log-probability -" in page.js("document.querySelector('#one .tokens span').title")
    assert page.problems() == []


def test_what_a_model_wrote_is_shown_and_not_run(browser, run):
    page = opened(browser, run, "stage2/trajectories/3/2")
    text = page.js("document.querySelector('#one .code').textContent")
    assert "</script><img src=x onerror=alert(1)> \\u202egpj.exe" in text
    assert page.js("document.querySelectorAll('img[src=x]').length") == 0
    assert page.problems() == []


def test_a_script_that_is_smuggled_in_does_not_run(page):
    page.js("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.bad=1\">')")
    page.js("document.body.insertAdjacentHTML('beforeend', '<b style=\"color:red\">x</b>')")
    page.wait("document.body.lastElementChild.previousElementSibling.complete")
    assert page.js("window.bad") is None
    assert any("Content Security Policy" in problem for problem in page.problems())


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone(browser, run, dark):
    page = browser.open((run / "report.html").as_uri(), width=390, height=800, dark=dark)
    page.wait(READY)
    wide = "document.documentElement.scrollWidth"
    page.js("document.querySelectorAll('details').forEach(x => x.open = true)")
    assert page.js(wide) <= 390
    page.click(".card")
    page.wait("document.querySelector('#one[open] .turns')")
    assert page.js(wide) <= 390
    assert page.js("document.querySelector('#one').scrollWidth") <= 390


def luminance(page, expression):
    color = page.js(f"getComputedStyle({expression}).color")
    return sum(map(float, color[4:-1].split(",")[:3])) / 3


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(browser, run, dark):
    page = browser.open((run / "report.html").as_uri(), dark=dark)
    page.wait(READY)
    ground = page.js("getComputedStyle(document.body).backgroundColor")
    ground = sum(map(float, ground[4:-1].split(",")[:3])) / 3
    for what in ("document.body", "document.querySelector('.card')", "document.querySelector('a')"):
        assert abs(luminance(page, what) - ground) > 80
    assert (ground < 60) == dark


def test_a_report_of_one_file_loads_nothing(browser, run, tmp_path):
    path = tmp_path / "mail.html"
    write_one_file(run, str(path))
    page = browser.open(path.as_uri())
    page.wait(READY)
    assert count(page).startswith("64 ") or count(page).startswith("48 ")
    assert loaded(page, "#list") >= 40
    page.click(".card")
    page.wait("document.querySelector('#one[open] .turns')")
    loaded(page, "#one .pictures")
    addresses = [url for url in page.requests() if not url.startswith("data:")]
    assert addresses == [path.as_uri()] and page.problems() == []


def test_data_that_are_gone_are_said(browser, run, tmp_path):
    (tmp_path / "alone.html").write_bytes((run / "report.html").read_bytes())
    page = browser.open((tmp_path / "alone.html").as_uri())
    page.wait("document.getElementById('loading').textContent.includes('cannot be loaded')")


def test_a_page_of_a_run_that_goes_follows_it(browser, tmp_path):
    run = fake_run(tmp_path / "run", steps=1)
    with Server(Live(run, seconds=0.2), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            page = browser.open(server.url)
            page.wait("document.body.dataset.live === 'yes'")
            assert count(page) == "40 trajectories"
            page.js("document.querySelector('#results details').open = true")
            Maker(run / "stage2" / "trajectories", 3, True).write(7, 2, 2)
            alarm(run / "stage2", "stage2", 60, "forged", "begins", 0.5)
            page.wait("document.getElementById('count').textContent === '44 trajectories'")
            page.wait("document.querySelectorAll('#alarms .alarm').length === 2")
            red = page.js("getComputedStyle(document.querySelector('.alarm b')).color")
            assert red == "rgb(179, 32, 44)"
            assert page.js("document.querySelector('#results details').open")  # as it was left
            assert page.js(f"{CARDS}.length") == 24 and loaded(page, "#list") >= 40
            assert page.problems() == []
        finally:
            server.shutdown()
            thread.join()
    page.wait("document.getElementById('loading').textContent.includes('does not answer')")
