"""MLflow's tracking REST protocol: one module per resource, each with its request models, rules and handlers.

`wire` turns requests into models and answers into bytes, `validation` holds MLflow's rules and messages, `backend` is
what handlers write to and read from. Nothing here knows the web server around it except Starlette's request objects.
"""

from __future__ import annotations

__all__: list[str] = []
