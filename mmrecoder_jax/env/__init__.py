"""The chart environment: untrusted plotting scripts in, renders and records out. Imports no JAX."""

from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.env.execution import EnvConfig, Execution, Record, Status
from mmrecoder_jax.env.pool import ExecutorPool

__all__ = ["ChartEnv", "EnvConfig", "Execution", "ExecutorPool", "Record", "Status"]
