"""A `runstream server` as the tracking address: login, connections, what the server says of itself, its artifacts.

Standard library alone. How events go there is `transport.http`'s business, and whether they do `transport.server`'s.
"""

__all__: list[str] = []
