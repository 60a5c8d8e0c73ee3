"""MM-ReCoder in JAX (arXiv 2604.01600). Importing this package starts no JAX: the execution side
must start fast.
"""
