"""The contracts every runstream process shares: events, topics, limits, the directory log's format and the SQL schema.

Imports nothing of ours. Submodules are imported one by one, so that a training process pays only for what it uses:
`names`, `limits`, `identity`, `layout` and `segment` need the standard library alone, `codec` needs fastavro.
"""

__all__: list[str] = []
