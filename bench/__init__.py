"""Benchmarks: `test_*.py` ask one module a question (pytest-benchmark), `load` a whole server over real sockets."""
