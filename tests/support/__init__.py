"""Helpers that tests share: videos, processes, servers; no tests."""
