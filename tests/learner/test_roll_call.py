"""Who has come, and who has not: processes are threads here, the address is real."""

import socket
import threading

import pytest

from mmrecoder_jax.learner.roll_call import Missing, wait_for_all

HERE = socket.gethostname()


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def outcomes(address, count, numbers, seconds):
    """What came of each process: "" where all have come, else the message."""
    found = {}

    def one(number):
        try:
            wait_for_all(address, count, number, seconds)
            found[number] = ""
        except Missing as error:
            found[number] = str(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_where_all_come_all_go_on_and_the_address_is_free(address, order):
    assert outcomes(address, 4, order, 20) == dict.fromkeys(range(4), "")
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        pass


def test_those_that_came_say_who_did_not(address):
    found = outcomes(address, 4, (0, 2), 1.5)
    line = (
        f"waited 1.5 s for processes 1, 3 of 4, which have not come (those that have: 0 on {HERE}, "
        f"2 on {HERE}); start all of them, each once, at about the same time"
    )
    assert found == {0: line, 2: line}


def test_process_0_is_named_by_its_address(address, monkeypatch):
    monkeypatch.setattr("mmrecoder_jax.learner.roll_call._MARGIN_SECONDS", 0.2)
    (line,) = outcomes(address, 2, (1,), 0.5).values()
    assert line.startswith(f"waited 0.5 s for process 0 of 2, which does not answer at {address}")


def test_others_that_speak_there_are_not_counted(address):
    host, _, port = address.rpartition(":")

    def strangers():
        for words in (
            b"GET / HTTP/1.0\n",
            b'{"number": 1, "of": 3}\n',
            b'{"number": 9, "of": 2}\n',
        ):
            for _ in range(50):
                try:
                    with socket.create_connection((host, int(port)), timeout=1) as connection:
                        connection.sendall(words)
                        break
                except OSError:
                    threading.Event().wait(0.05)

    other = threading.Thread(target=strangers)
    other.start()
    (line,) = outcomes(address, 2, (0,), 2.5).values()
    other.join()
    assert line.startswith("waited 2.5 s for process 1 of 2, which has not come")


def test_an_address_that_is_taken_is_an_error(address):
    taken = socket.create_server(("", int(address.rpartition(":")[2])))
    with taken, pytest.raises(OSError, match="in use"):
        wait_for_all(address, 2, 0, 1)
