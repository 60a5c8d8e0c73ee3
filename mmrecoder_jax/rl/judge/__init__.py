"""The model reward: `base` is what judges share, `answers` and `differences` what is asked and how
answers are read, `http`, `local` and `visual` the judges, `make` chooses one.
"""
