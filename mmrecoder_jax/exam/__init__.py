"""Benchmarks by one command: what is asked, what was answered, what it scores, and the tables."""
