"""Artifacts on their way to and from storage, through fsspec alone: legal paths, content, retries, stores, transfers.

Owns bytes. Events, runs and the public calls are `run_artifacts`', `client_artifacts`' and `artifacts`' business.
"""

__all__: list[str] = []
