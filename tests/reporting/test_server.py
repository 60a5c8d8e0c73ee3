"""The page of a run that goes: what is served, what is refused, and that nothing is written."""

import http.client
import json
import os
import re
import threading

import pytest

from mmrecoder_jax.reporting.server import Live, Server
from tests.reporting.fake_run import Maker, alarm, fake_run
from tests.reporting.tags import Tags


@pytest.fixture
def run(tmp_path):
    return fake_run(tmp_path / "run", steps=2)


@pytest.fixture
def ask(run):
    """`ask(path)`: (status, headers, body) of a request to the server of the run."""
    with Server(Live(run), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = server.server_address[1]

        def request(path, method="GET", **headers):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, headers={"Host": f"127.0.0.1:{port}"} | named)
            answer = connection.getresponse()
            found = answer.status, dict(answer.getheaders()), answer.read()
            connection.close()
            return found

        request.port = port
        yield request
        server.shutdown()
        thread.join()


def now(ask):
    status, _, body = ask("/report/now.js")
    assert status == 200
    return json.loads(body.decode().removeprefix('mm("now",').removesuffix(");\n"))


def test_the_page_its_data_and_its_pictures(ask):
    status, headers, body = ask("/")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert '"seconds":3.0' in body.decode()
    Tags(body.decode())
    assert ask("/report.html#x")[0] == 200
    sources = now(ask)["sources"]
    assert [source["step"] for source in sources] == [0, 2, 1, 0]
    key = sources[1]["key"]
    _, headers, body = ask(f"/report/{key}/list.js")
    assert headers["Content-Type"].startswith("text/javascript")
    entries = json.loads(body.decode().partition(",")[2].removesuffix(");\n"))
    assert len(entries) == 16
    assert ask(f"/report/{key}/0.js")[0] == 200
    status, headers, body = ask("/" + entries[0][-2])
    assert (status, headers["Content-Type"]) == (200, "image/png") and body.startswith(b"\x89PNG")
    status, headers, body = ask("/", "HEAD")
    assert status == 200 and body == b"" and int(headers["Content-Length"]) > 1000


def test_new_steps_metrics_and_alarms_appear(ask, run):
    before = now(ask)
    assert now(ask) == before  # nothing has changed
    Maker(run / "stage2" / "trajectories", 5, True).write(9, 1, 2)
    with open(run / "stage2" / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps({"stage": "stage2", "step": 61, "reward": 0.123}) + "\n")
    alarm(run / "stage2", "stage2", 61, "forged", "begins", 0.5)
    after = now(ask)
    assert after["sources"][1]["step"] == 9
    assert {n for n in after["marks"] if after["marks"][n] != before["marks"][n]} >= {
        *("alarms", "curves"),
    }
    assert "0.123" in after["parts"]["curves"] and "<b>forged</b>" in after["parts"]["alarms"]


def test_half_written_lines_and_files_are_left_out(ask, run):
    with open(run / "stage2" / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"stage": "stage2", "step": 61, "rew')
    with open(run / "stage2" / "alarms.jsonl", "a", encoding="utf-8") as f:
        f.write('{"stage": "sta')
    (run / "stage2" / "evaluation.json").write_text('[{"policy": ')
    path = run / "stage2" / "trajectories" / "000002.jsonl"
    path.write_bytes(path.read_bytes()[:-200])
    found = now(ask)
    assert "60 steps" in found["parts"]["curves"]
    _, _, body = ask(f"/report/{found['sources'][1]['key']}/list.js")
    assert body.count(b"train-0002") == 15


def test_a_directory_in_which_nothing_is_yet_has_a_page_that_waits(tmp_path):
    live = Live(tmp_path)
    assert "No step has ended yet" in live.page()
    fake_run(tmp_path / "later")
    for stage in ("stage1", "stage2"):
        os.rename(tmp_path / "later" / stage, tmp_path / stage)
    assert "No step has ended yet" not in live.page()


@pytest.mark.parametrize(
    "path",
    [
        *("/stage2/config.json", "/stage2/metrics.jsonl", "/../secret.png", "/..%2fsecret.png"),
        *("/%2e%2e/secret.png", "//etc/passwd", "/stage2/../../secret.png", "/link.png"),
        *("/report/nothing/0.js", "/report/now/../../x.js", "/report/%00.js", "/a%00.png"),
        *("/stage2", "/nothing.png"),
    ],
)
def test_nothing_else_is_served(ask, run, path):
    (run.parent / "secret.png").write_bytes(b"secret")
    if not (run / "link.png").exists():
        (run / "link.png").symlink_to(run.parent / "secret.png")
    status, _, body = ask(path)
    assert status in (404, 503) and b"secret" not in body and b"root:" not in body


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "evil.example:{port}", "", "[::1]"])
def test_another_host_is_refused(ask, host):
    assert ask("/", Host=host.format(port=ask.port))[0] == 403


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]"])
def test_the_names_of_this_machine_are_answered(ask, name):
    assert ask("/", Host=f"{name}:{ask.port}")[0] == 200


@pytest.mark.parametrize("site, status", [("cross-site", 403), ("same-site", 403), ("none", 200)])
def test_a_page_of_somebody_else_cannot_load_the_data(ask, site, status):
    found, headers, _ = ask("/report/now.js", Sec_Fetch_Site=site)
    assert found == status and headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_sent(ask, method):
    assert ask("/", method)[0] == 501


def test_a_run_is_never_written_to(ask, run):
    def state():
        return {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    before = state()
    sources = now(ask)["sources"]
    for path in ("/", *(f"/report/{s['key']}/{part}.js" for s in sources for part in ("list", 0))):
        assert ask(path)[0] == 200
    assert state() == before


def test_two_servers_do_not_share_a_port(run):
    with Server(Live(run), 0) as first, pytest.raises(OSError, match="in use"):
        Server(Live(run), first.server_address[1])


def test_the_address_is_on_loopback(run):
    with Server(Live(run), 0) as server:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", server.url)
