"""The rules for posted events: permissions per experiment, and audit lines for administrative ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from starlette.requests import Request

from runstream.transport import Event
from runstream_query.api.backend import Backend

from .audit import Act, Audit
from .delivery import Checked
from .permission import Owner, check_events, check_path
from .principal import Principal

if TYPE_CHECKING:
    from starlette.types import Scope

__all__ = ["DeliveryGuard"]


class DeliveryGuard:
    """`delivery.Guard` of a server with an auth file, or with everybody as admin."""

    def __init__(
        self, backend: Callable[[], Backend], owner_of: Callable[[Principal], Owner | None], audit: Audit
    ) -> None:
        self._backend = backend
        self._owner_of = owner_of
        self._audit = audit

    async def append(self, request: Request, events: Sequence[Event]) -> None:
        """See `Guard`. Events of a limited principal are decoded, metric batches too."""
        principal = _principal(request.scope)
        if principal.restricted:
            await check_events(self._backend(), principal, events, self._owner_of(principal))

    async def read_artifact(self, request: Request, path: str) -> None:
        """See `Guard`."""
        principal = _principal(request.scope)
        if principal.restricted:
            await check_path(self._backend(), principal, "read", path)

    def appended(self, request: Request, events: Sequence[Checked]) -> None:
        """See `Guard`: one audit line for each deletion, restoration, renaming and purge."""
        for item in events:
            act = _act(item)
            if act is not None:
                self._audit.note(act, request.scope, status=200, about=item.event.key)


def _principal(scope: Scope) -> Principal:
    found: Principal = scope["runstream_principal"]
    return found


def _act(item: Checked) -> Act | None:
    if item.name == "purged":
        return "purge"
    if item.name not in ("experiment_updated", "run_updated"):
        return None
    stage = item.fields.get("lifecycle_stage")
    if stage == "deleted":
        return "delete"
    if stage == "active":
        return "restore"
    return "rename" if item.name == "experiment_updated" and item.fields.get("name") else None
