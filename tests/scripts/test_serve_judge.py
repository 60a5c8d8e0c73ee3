"""scripts/serve_judge.sh with programs in place of the servers."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.scripts.fake_cloud import ROOT

SCRIPT = ROOT / "scripts" / "serve_judge.sh"
MODEL = "Qwen/Qwen2.5-VL-72B-Instruct"
SERVER = f"""#!{sys.executable}
import http.server, os, sys
print("words", *sys.argv[1:], flush=True)
if os.environ.get("BROKEN"):
    sys.exit(3)
key = os.environ.get("VLLM_API_KEY")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        right = not key or self.headers["Authorization"] == "Bearer " + key
        self.send_response(200 if right and self.path == "/v1/models" else 401)
        self.end_headers()
    def log_message(self, *args):
        print("asked", self.path, flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def run(*arguments, **variables):
    environment = {"PATH": os.environ["PATH"], "HOME": "/", **variables}
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_of_vllm():
    done = run("vllm", "--devices=4", "--dry_run", "--", "--quantization", "awq")
    words = shlex.split(done.stdout)
    assert words[:3] == ["vllm", "serve", MODEL]
    assert words[words.index("--tensor-parallel-size") + 1] == "4"
    assert words[words.index("--limit-mm-per-prompt") + 1] == '{"image": 2}'
    assert words[-2:] == ["--quantization", "awq"]


def test_the_command_of_sglang():
    words = shlex.split(run("sglang", "--model=/m/judge", "--port=9000", "--dry_run").stdout)
    assert words[:5] == ["python", "-m", "sglang.launch_server", "--model-path", "/m/judge"]
    assert words[-2:] == ["--port", "9000"] and words[words.index("--tp") + 1] == "8"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tgi"], "no server 'tgi': use vllm or sglang"),
        (["vllm", "--device=2"], "unknown argument '--device=2'"),
        (["vllm", "--devices=two"], "--devices=two: use a whole number"),
        (["vllm", "--port=70000"], "--port=70000: use 1 to 65535"),
        (["vllm"], "vllm is not installed here: pip install vllm"),
        (["sglang"], "sglang is not installed here"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_key_that_no_header_holds_is_refused_unseen():
    done = run("vllm", "--dry_run", MMRECODER_JUDGE_KEY="top secret")
    assert done.returncode == 1 and "MMRECODER_JUDGE_KEY" in done.stderr
    assert "secret" not in done.stderr


@pytest.fixture
def programs(tmp_path):
    (tmp_path / "vllm").write_text(SERVER)
    (tmp_path / "vllm").chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_server_is_waited_for_and_ends_with_the_script(programs):
    port = free_port()
    environment = {"PATH": programs, "HOME": "/", "MMRECODER_JUDGE_KEY": "k3y"}
    process = subprocess.Popen(
        ["bash", SCRIPT, "vllm", f"--port={port}", "--wait=30"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("judge: ready"):
            break
    assert "k3y" not in lines[0]  # not among the words that a process list shows
    assert f":{port}/v1" in lines[-1] and f"--config.judge.model={MODEL}" in lines[-1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.1)
    pytest.fail("the server still listens")


def test_a_server_that_ends_at_once_is_told(programs):
    done = run("vllm", f"--port={free_port()}", PATH=programs, BROKEN="1")
    assert done.returncode == 1 and "the server ended with 3 before it answered" in done.stderr
