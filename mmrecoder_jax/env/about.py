"""What executors need to know of the Python that runs this: its version, packages and folders.

`interpreter.py` calls it for the trainer's own Python and runs it as a program under any other,
whatever its version: it prints one JSON object there. So it imports nothing at its top but what
every Python 3 has.
"""

import json
import os
import sys

LEAST_PYTHON = (3, 11)
# What scripts draw with; executors need the first two, and scripts have what is installed.
LIBRARIES = (
    *("numpy", "matplotlib", "pandas", "seaborn"),
    *("scipy", "networkx", "squarify", "matplotlib-venn"),
)


def about():
    """{"version": [3, 11, 7], "releases": {"numpy": "2.1.0", ...}, "reads": [path, ...]}.

    `reads` are the folders and files that an executor reads, outer ones first; an interpreter that
    is too old has none, and no releases.
    """
    facts = {"version": list(sys.version_info[:3]), "releases": {}, "reads": []}  # type: dict
    if sys.version_info >= LEAST_PYTHON:
        from mmrecoder_jax.env.sandbox import bubblewrap

        facts["releases"] = _releases()
        facts["reads"] = bubblewrap.executor_reads()
    return facts


def _releases():
    from importlib import metadata

    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    # Its own folder has no module for anybody; that of the package has.
    sys.path[0] = os.path.abspath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir))
    print(json.dumps(about()))
