"""Commands and the jobs behind them."""

INTERRUPTED = "interrupted; run the same command again to continue"
"""Last line of a command that a signal ended. It stands here because it is needed before anything else is imported."""
