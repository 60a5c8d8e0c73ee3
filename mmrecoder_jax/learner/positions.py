"""Where each host stood in the data when a checkpoint was saved, and where it stands now.

Host h of n reads items h, h + n, h + 2n, ... of one order (`data.pipeline`), and its place is how
many of them it has read:

    saved by 1 host       12 items
    read by 3 hosts        4 items each, of the same 12

So as many hosts as one likes may go on, where all of them had read as many: a row that cannot be
read sets one host ahead of the others, and then only as many hosts can go on as have saved.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import grain
from etils import epath

from mmrecoder_jax.config import ConfigError

State = Mapping[str, Any]
_FILE = re.compile(r"process_(\d+)-of-(\d+)\.json")  # grain's names


def saved(directory: epath.Path) -> list[State]:
    """The places of a checkpoint's hosts, in their order.

    Args:
      directory: the item that grain wrote.

    Raises:
      ValueError: the files of some hosts are not there, or cannot be read.
    """
    found = {}
    count = 0
    for path in directory.iterdir():
        if match := _FILE.fullmatch(path.name):
            found[int(match[1])], count = json.loads(path.read_text()), int(match[2])
    if not found or sorted(found) != list(range(count)):
        raise ValueError(f"{directory} has the places of {len(found)} hosts of {count}")
    return [found[host] for host in range(count)]


def move(iterator: grain.DatasetIterator, states: list[State], host: int, hosts: int) -> None:
    """Moves an iterator to where it was, or to where it would be with another number of hosts.

    Args:
      states: of the hosts that saved.

    Raises:
      ConfigError: there were other hosts, and they had not read alike.
    """
    if len(states) == hosts:
        iterator.set_state(states[host])
        return
    first, before = states[0], len(states)
    alike = all(state == first for state in states) and set(first) == {"next_index"}
    if not alike or first["next_index"] * before % hosts:
        why = (
            f"they had read {first['next_index'] * before} rows, which {hosts} do not divide"
            if alike
            else "they do not stand at one place in the data (one could not read a row)"
        )
        raise ConfigError(
            f"the newest checkpoint is of {before} processes, from which {hosts} cannot go on: "
            f"{why}; start {before}"
        )
    iterator.set_state({"next_index": first["next_index"] * before // hosts})
