"""A script runs as `python script.py` would run it."""

import pytest

from mmrecoder_jax.env import Status
from mmrecoder_jax.env.wire import RecordKind

DRAW = "import matplotlib.pyplot as plt\nplt.bar([1, 2], [3, 4])\nplt.savefig('a.png')\n"
SCRIPTS = {
    "its file": (
        "import os\n"
        "here = os.path.dirname(__file__)\n"
        "assert os.path.samefile(here, os.getcwd()) and os.path.isabs(__file__)\n"
        "assert 'assert os.path' in open(__file__).read()\n"
    ),
    "its arguments": "import argparse\nargparse.ArgumentParser().parse_args()\n",
    "its classes are pickled": (
        "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A\n"
    ),
    "its own module": "import __main__\nx = 5\nassert __main__.x == 5\n",
    "its source": (
        "import inspect\ndef f(): return 1\nassert inspect.getsource(f).endswith('return 1\\n')\n"
    ),
    "a home to write to": (
        "import pathlib\n"
        "place = pathlib.Path.home() / '.cache'\n"
        "place.mkdir()\n"
        "(place / 'x').write_text('x')\n"
    ),
    "a module that it wrote": (
        "open('mine.py', 'w').write('value = 3')\nimport mine\nassert mine.value == 3\n"
    ),
    "a byte-order mark": "\ufeff",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_python_gives_a_script_is_there(pool, name):
    execution = pool.run([SCRIPTS[name] + DRAW])[0]
    assert execution.status == Status.OK, execution.error


@pytest.mark.parametrize("kind", [RecordKind.OFFICIAL_CALLS, RecordKind.PLOT2CODE])
@pytest.mark.parametrize("name", ["its file", "its arguments"])
def test_benchmarks_give_it_too(pool, kind, name):
    execution = pool.submit(SCRIPTS[name] + DRAW, kind).result()
    assert execution.status == Status.OK, execution.error


def test_one_script_leaves_nothing_of_its_module_to_the_next(pool):
    first, second = pool.run([f"left = 1\n{DRAW}", f"import __main__\n__main__.left\n{DRAW}"])
    assert first.ok and "has no attribute 'left'" in second.error
