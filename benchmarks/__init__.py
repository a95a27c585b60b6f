"""Measurements that anyone can rerun: each prints a table and, with ``--json PATH``, writes its figures."""
