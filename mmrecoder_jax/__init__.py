"""MM-ReCoder in JAX (arXiv 2604.01600).

Importing this package imports nothing else: the execution side must start fast, without JAX.
"""

__version__ = "0.2.0.dev0"  # the one home of the version: setup.py reads this line
