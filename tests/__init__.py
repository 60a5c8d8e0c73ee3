"""The tests mirror the package, one file beside one module."""

from tests import typecheck as typecheck  # jaxtyping's hook finds it as `tests.typecheck`
