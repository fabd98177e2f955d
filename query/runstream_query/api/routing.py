"""One table of all MLflow routes: exact paths are found by one dictionary look-up, whatever their number.

Every path exists below `/api/<version>` and `/ajax-api/<version>` (MLflow's own UI).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from .backend import Backend
from .errors import ApiError
from .wire import Message

Handler = Callable[[Backend, Request], Awaitable[Response]]
PREFIXES: Final = ("/api", "/ajax-api")
_PARAMETER = re.compile(r"\{(\w+)(:path)?\}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One operation of the protocol."""

    method: str
    path: str
    """Below the prefix and version, for example `/mlflow/runs/create`; `{name}` is one part, `{name:path}` the rest."""
    handler: Handler
    request: type[Message] | None = None
    """Its request message, for documentation."""
    versions: tuple[str, ...] = ("2.0",)
    absolute: bool = False
    """True: `path` stands alone, without prefix and version."""

    def paths(self) -> Iterable[str]:
        """The full paths under which the operation is found."""
        if self.absolute:
            yield self.path
            return
        for prefix in PREFIXES:
            for version in self.versions:
                yield f"{prefix}/{version}{self.path}"


class EndpointTable(BaseRoute):
    """A Starlette route that answers for all `endpoints`."""

    def __init__(
        self,
        backend: Callable[[], Backend],
        endpoints: Iterable[Endpoint],
        answer: Callable[[Exception], Response],
        perform: Callable[[Endpoint, Backend, Request], Awaitable[Response]] | None = None,
    ) -> None:
        """Args:
        backend: what the handlers work with.
        answer: the response for an exception.
        perform: runs an operation instead of calling its handler: checks permissions first.
        """
        self.endpoints = tuple(endpoints)
        self._backend = backend
        self._answer = answer
        self._perform = perform
        self._exact: dict[str, dict[str, Endpoint]] = {}
        self._patterns: list[tuple[re.Pattern[str], Endpoint]] = []
        for endpoint in self.endpoints:
            for path in endpoint.paths():
                if "{" not in path:
                    methods = self._exact.setdefault(path, {})
                    methods[endpoint.method] = endpoint
                    continue
                parts = _PARAMETER.sub(lambda m: f"(?P<{m[1]}>{'.*' if m[2] else '[^/]+'})", path)
                self._patterns.append((re.compile(parts + r"\Z"), endpoint))

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Find the operation for the path; a known path with another method is answered 405."""
        if scope["type"] != "http":
            return Match.NONE, {}
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        if root and path.startswith(root + "/"):
            path = path[len(root) :]
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        methods = self._exact.get(path)
        if methods is not None:
            endpoint = methods.get(method)
            if endpoint is None:
                return Match.PARTIAL, {"runstream_endpoint": None}
            return Match.FULL, {"runstream_endpoint": endpoint}
        partial = False
        for pattern, candidate in self._patterns:
            found = pattern.match(path)
            if found is None:
                continue
            if candidate.method == method:
                return Match.FULL, {"runstream_endpoint": candidate, "path_params": found.groupdict()}
            partial = True
        return (Match.PARTIAL, {"runstream_endpoint": None}) if partial else (Match.NONE, {})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the operation and answer; every exception becomes the one error body."""
        endpoint: Endpoint | None = scope.get("runstream_endpoint")
        try:
            if endpoint is None:
                raise ApiError(
                    "ENDPOINT_NOT_FOUND", f"{scope['path']} does not take {scope['method']} requests.", status=405
                )
            request = Request(scope, receive, send)
            if self._perform is None:
                response = await endpoint.handler(self._backend(), request)
            else:
                response = await self._perform(endpoint, self._backend(), request)
        except Exception as exc:
            response = self._answer(exc)
        await response(scope, receive, send)

    def in_front_of(self, app: ASGIApp, root_path: str) -> ASGIApp:
        """`app`, with the operations taken before it: its layers cost a fifth of a log-metric and add nothing here.

        Args:
            root_path: the path prefix behind a proxy, which `app` would note in the scope.
        """

        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                if root_path:
                    scope["root_path"] = root_path
                match, found = self.matches(scope)
                if match is Match.FULL:
                    scope.update(found)
                    await self.handle(scope, receive, send)
                    return
            await app(scope, receive, send)

        return front

    def url_path_for(self, name: str, /, **path_params: object) -> None:  # type: ignore[override]
        """No operation has a name to build URLs from."""
        from starlette.routing import NoMatchFound

        raise NoMatchFound(name, path_params)
