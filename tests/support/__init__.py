"""What tests share: videos, processes, servers; no tests."""
