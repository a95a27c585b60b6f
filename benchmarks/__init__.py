"""Benchmarks: each prints a table and, with ``--json PATH``, also writes its figures."""
