"""What `python script.py` gives a script beside its code.

That is a `__main__` of its own (which `pickle` and `import __main__` look names up in), its file,
its arguments, and a home that it can write to. Without them scripts fail here that run elsewhere.
"""

import builtins
import contextlib
import os
import sys
import types
from types import CodeType
from typing import Any

SCRIPT_NAME = "script.py"  # the file that a script is compiled as


def become_main(code: str) -> tuple[CodeType, dict[str, Any]]:
    """Makes this process look like `python script.py` in the working directory.

    A byte-order mark before the code is the mark of a file and no code.

    Returns:
      The compiled script, and the namespace of the new `__main__` to execute it in.

    Raises:
      SyntaxError, ValueError: the code is no Python.
    """
    code = code.removeprefix("\ufeff")
    directory = os.getcwd()
    module = types.ModuleType("__main__")
    module.__file__ = os.path.join(directory, SCRIPT_NAME)
    names = vars(module)
    names["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = [SCRIPT_NAME]
    sys.path.insert(0, directory)
    os.environ["HOME"] = directory  # libraries make their caches there
    # A full disk is no matter: few scripts read themselves.
    with contextlib.suppress(OSError), open(module.__file__, "wb") as file:
        file.write(code.encode("utf-8", "surrogatepass"))
    return compile(code, SCRIPT_NAME, "exec", dont_inherit=True), names
