"""The journal: memory-mapped files that hold what was logged until the log has acknowledged it."""

__all__: list[str] = []
