"""The chart environment: untrusted plotting scripts in, renders and records out. Imports no JAX.

The folders say which process a module runs in (docs/environment.md):

    env/            the trainer: pool, execution, records; and `wire`, the protocol of all sides
    env/sandbox/    the trainer checks it, the zygote builds it, the child enters it
    env/executor/   the zygote: a warm interpreter that forks a child for every script
    env/child/      the process of one untrusted script
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrecoder_jax.env.chart_env import ChartEnv
    from mmrecoder_jax.env.execution import EnvConfig, Execution
    from mmrecoder_jax.env.pool import ExecutorPool
    from mmrecoder_jax.env.records import Record
    from mmrecoder_jax.env.wire import Status

__all__ = ["ChartEnv", "EnvConfig", "Execution", "ExecutorPool", "Record", "Status"]

_HOMES = {
    "ChartEnv": "chart_env",
    "EnvConfig": "execution",
    "Execution": "execution",
    "ExecutorPool": "pool",
    "Record": "records",
    "Status": "wire",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562).

    The zygote imports `mmrecoder_jax.env.wire` and so runs this file. Eager imports here would load
    the trainer's side into it, and every untrusted child would inherit that.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
