"""What a model reads of an exception."""

import pytest


@pytest.mark.parametrize(
    "code",
    [
        "import urllib.request\nurllib.request.urlopen('http://example.com/data.csv')",
        "import socket\nsocket.create_connection(('192.0.2.1', 80))",
        "import socket\nsocket.getaddrinfo('example.com', 80)",
        "import http.client\nhttp.client.HTTPConnection('example.com').request('GET', '/')",
        "import socket\ntry:\n    socket.socket()\nexcept OSError:\n    raise ValueError('no')",
    ],
)
def test_an_error_of_the_network_says_that_there_is_none(pool, code):
    assert "There is no network here" in pool.run([code])[0].error


@pytest.mark.parametrize(
    "code", ["open('/etc/shadow')", "raise OSError('Operation not permitted')"]
)
def test_other_errors_do_not(pool, code):
    assert "network" not in pool.run([code])[0].error


@pytest.mark.parametrize(
    "code, reason",
    [
        ("plt.rcParams['text.usetex'] = True\nplt.title('a')\nplt.savefig('a.png')", "no LaTeX"),
        ("import tkinter\ntkinter.Tk()", "no screen"),
        ("import subprocess\nsubprocess.run(['ls'])", "No other program"),
        ("import subprocess\nsubprocess.check_output('ls', shell=True)", "No other program"),
        ("import os\nos.fork()", "No other program"),
        ("import multiprocessing\nmultiprocessing.Pool(2)", "No other program"),
        ("import _socket\n_socket.socket()", "no network"),
        ("open('/etc/passwd')", "here"),  # inside bubblewrap it does not even exist
        ("import os\nos.makedirs('/output/figures')", "outside the script's own folder"),
        ("open('data/a.csv')", "no file or folder here"),
        ("import numpy as np\nnp.loadtxt('a.csv')", "no file or folder here"),
        ("plt.imread('photo.png')", "no file or folder here"),
        (
            "try:\n    open('a.csv')\nexcept OSError as e:\n    raise RuntimeError('no') from e",
            "no file or folder here",
        ),
    ],
)
def test_a_failure_that_is_the_doing_of_the_sandbox_is_named(pool, code, reason):
    (execution,) = pool.run(["import matplotlib.pyplot as plt\n" + code])
    assert reason in execution.error.splitlines()[-1]
    assert "mmrecoder-env" not in execution.error


@pytest.mark.parametrize(
    "code",
    [
        "raise FileNotFoundError('a.csv')",
        "raise PermissionError('Operation not permitted')",
        "raise ValueError('a')",
        "undefined",
    ],
)
def test_what_the_script_raises_itself_stands_alone(pool, code):
    assert pool.run([code])[0].error.count("\n") == 1  # its line, and its message


USAGE = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("file")
parser.parse_args()
"""


@pytest.mark.parametrize(
    "code, words",
    [
        (USAGE, "script.py: error: the following arguments are required: file"),
        ("import sys\nprint('no data', file=sys.stderr)\nsys.exit(3)", "no data"),
        ("import sys\nsys.stderr.write('no ' + 'data')\nsys.exit(1)", "no data"),
        ("import sys\nsys.exit('no data')", "SystemExit: no data"),
    ],
)
def test_a_script_that_ends_with_a_number_says_why_on_stderr(pool, code, words):
    assert pool.run([code])[0].error.endswith(words)


def test_only_the_end_of_stderr_is_shown_and_only_to_an_exit(pool):
    write = "import sys\nsys.stderr.write('x' * 100_000 + 'end')\n"
    exited, failed = (run.error for run in pool.run([write + "sys.exit(2)", write + "1 / 0"]))
    assert exited.endswith("xend") and exited.count("x") < 1000
    assert failed.endswith("ZeroDivisionError: division by zero")


def test_stderr_is_a_file_as_ever(pool):
    code = "import sys\nsys.stderr.buffer.write(b'a')\nraise ValueError(sys.stderr.fileno())"
    assert pool.run([code])[0].error.endswith("ValueError: 2")


@pytest.mark.parametrize(
    "code, message",
    [
        ("raise ValueError(object())", "ValueError: <object object at 0x…>"),
        ("import tempfile\nraise ValueError(tempfile.mkdtemp())", "ValueError: tmp…"),
        ("raise ValueError('#336699', 0x336699, hex(0x336699))", "3368601, '0x336699')"),
    ],
)
def test_what_differs_from_process_to_process_is_left_out(pool, code, message):
    assert pool.run([code])[0].error.endswith(message)


def test_an_error_that_caused_itself_is_described(pool):
    code = "a, b = ValueError('a'), ValueError('b')\na.__context__ = b\nb.__context__ = a\nraise a"
    assert pool.run([code])[0].error.endswith("ValueError: a")


def test_the_same_script_reads_the_same_error_wherever_it_runs(pool):
    code = "import os\nopen(os.path.join(os.getcwd(), 'no', 'data.csv'))"
    assert "'no/data.csv'" in pool.run([code])[0].error
    assert pool.run(["import os\nraise ValueError(os.getcwd())"])[0].error.endswith("Error: .")
