"""The places of hosts in the data, for as many hosts or for others."""

import json

import grain
import pytest
from etils import epath

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.learner import positions


def stream(host, hosts):
    numbers = grain.MapDataset.range(1000).seed(3).shuffle().repeat()[host::hosts]
    return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def read(iterators, count):
    """The next items of hosts that read in turn, as many from each."""
    return [next(iterator) for _ in range(count) for iterator in iterators]


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_others_go_on_with_the_same_items(before, after):
    whole = read([stream(0, 1)], 24)
    first = [stream(host, before) for host in range(before)]
    seen = read(first, 12 // before)
    states = [iterator.get_state() for iterator in first]
    later = [stream(host, after) for host in range(after)]
    for host, iterator in enumerate(later):
        positions.move(iterator, states, host, after)
    assert seen + read(later, 12 // after) == whole


def test_hosts_that_stand_apart_go_on_as_they_are_and_not_otherwise():
    states = [{"next_index": 4}, {"next_index": 5}]
    same = stream(1, 2)
    positions.move(same, states, 1, 2)
    assert same.get_state() == {"next_index": 5}
    with pytest.raises(ConfigError, match=r"of 2 processes, .* at one place .* start 2"):
        positions.move(stream(0, 1), states, 0, 1)
    with pytest.raises(ConfigError, match=r"had read 4 rows, which 3 do not divide"):
        positions.move(stream(0, 3), [{"next_index": 4}], 0, 3)


def test_a_place_of_another_form_is_not_converted():
    with pytest.raises(ConfigError, match="start 1"):
        positions.move(stream(0, 2), [{"next_index": 4, "inner": {}}], 0, 2)


def test_the_files_of_all_hosts_are_needed(tmp_path):
    folder = epath.Path(tmp_path)
    for host in (1, 0, 2):
        (folder / f"process_{host}-of-3.json").write_text(json.dumps({"next_index": host}))
    (folder / "commit_success.txt").write_text("")
    assert positions.saved(folder) == [{"next_index": n} for n in range(3)]
    (folder / "process_1-of-3.json").unlink()
    with pytest.raises(ValueError, match="2 hosts of 3"):
        positions.saved(folder)
    (folder / "process_1-of-3.json").write_text("{")
    with pytest.raises(ValueError):
        positions.saved(folder)
