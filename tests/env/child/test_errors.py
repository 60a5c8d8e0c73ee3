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


def test_an_error_that_caused_itself_is_described(pool):
    code = "a, b = ValueError('a'), ValueError('b')\na.__context__ = b\nb.__context__ = a\nraise a"
    assert pool.run([code])[0].error.endswith("ValueError: a")


def test_the_same_script_reads_the_same_error_wherever_it_runs(pool):
    code = "import os\nopen(os.path.join(os.getcwd(), 'no', 'data.csv'))"
    assert "'no/data.csv'" in pool.run([code])[0].error
    assert pool.run(["import os\nraise ValueError(os.getcwd())"])[0].error.endswith("Error: .")
