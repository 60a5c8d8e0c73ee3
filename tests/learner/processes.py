"""Starts a command as one process or as several that form one run."""

import os
import socket
import subprocess
from collections.abc import Sequence


def environments(hosts: int) -> list[dict[str, str]]:
    """The environment of each of so many processes, which talk on this machine alone: without
    proxies, of which JAX warns among what a test reads.
    """
    plain = {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    }
    if hosts == 1:
        return [plain]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    run = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
    return [plain | run | {"JAX_PROCESS_ID": str(host)} for host in range(hosts)]


def ends(
    command: Sequence[str], hosts: int, seconds: float, missing: int = -1, stopped: int = -1
) -> list[tuple[int, str, str]]:
    """(exit status, output, errors) of the command in each of so many processes.

    Args:
      missing: a process that is not started.
      stopped: a process that does not end by itself; what it returns means nothing.
    """
    running = [
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for host, env in enumerate(environments(hosts))
        if host != missing
    ]
    try:
        waited = [process for host, process in enumerate(running) if host != stopped]
        texts = {process: process.communicate(timeout=seconds) for process in waited}
        for process in set(running) - set(waited):
            process.kill()
            texts[process] = process.communicate()
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts[process]) for process in running]


def run(command: Sequence[str], hosts: int, seconds: float = 900) -> list[str]:
    """The output of the command in each of so many processes, all of which must end well."""
    found = ends(command, hosts, seconds)
    for status, out, problem in found:
        assert status == 0, out[-2000:] + problem[-3000:]
    return [out for _, out, _ in found]
