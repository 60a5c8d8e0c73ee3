"""Published benchmarks: their own rules, run in the sandboxed executors."""
