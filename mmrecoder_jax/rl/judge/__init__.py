"""The model reward: `base` is what judges share, `answers` the prompts and how answers are read,
`http`, `local` and `visual` the judges, `make` chooses one.
"""
