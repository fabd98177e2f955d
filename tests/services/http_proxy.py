"""A proxy in front of an HTTP server that holds, drops or passes requests: a fault at an exact moment."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote_plus

__all__ = ["Gate", "HttpProxy", "proxy"]

Rule = Callable[[str], bool]
"""Given the query string and the beginning of the body, as text."""


class Gate:
    """Requests of one rule wait here, before or after the server has had them."""

    def __init__(self, rule: Rule, *, after: bool) -> None:
        self._rule = rule
        self.after = after
        """True: the server does its work, and its answer is held back."""
        self.reached = threading.Event()
        """Set when the first request has come to it."""
        self._open = threading.Event()
        self._answer = True

    def release(self, *, answer: bool = True) -> None:
        """Let those that wait, and all later ones, through; without an answer their connections are cut instead."""
        self._answer = answer
        self._open.set()

    def holds(self, what: str) -> bool:
        return not self._open.is_set() and self._rule(what)

    def wait(self) -> bool:
        """Blocks the request; whether it may be answered."""
        self.reached.set()
        self._open.wait(120)
        return self._answer


class HttpProxy:
    """Forwards to 127.0.0.1:`port`. One thread a connection."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._gates: list[Gate] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                with suppress(OSError, http.client.HTTPException):
                    proxy._forward(self)
                    return
                self.close_connection = True

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a killed client

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def hold(self, rule: Rule, *, after: bool = False) -> Gate:
        """A new gate; it holds from now on."""
        gate = Gate(rule, after=after)
        self._gates.append(gate)
        return gate

    def close(self) -> None:
        for gate in self._gates:
            gate.release(answer=False)
        self._server.shutdown()
        self._server.server_close()

    def _forward(self, handler: BaseHTTPRequestHandler) -> None:
        body = _body(handler)
        what = unquote_plus(handler.path) + "\n" + body[:500].decode("utf-8", "replace")
        for gate in self._gates:
            if not gate.after and gate.holds(what) and not gate.wait():
                raise ConnectionAbortedError
        connection = http.client.HTTPConnection("127.0.0.1", self._target, timeout=120)
        try:
            headers = {
                name: value
                for name, value in handler.headers.items()
                if name.lower() not in ("transfer-encoding", "content-length", "host", "connection")
            }
            connection.request(handler.command, handler.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        for gate in self._gates:
            if gate.after and gate.holds(what) and not gate.wait():
                raise ConnectionAbortedError
        handler.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
        parts = []
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        while handler.rfile.readline().strip():
            pass
        return b"".join(parts)
    return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))


@contextmanager
def proxy(port: int) -> Iterator[HttpProxy]:
    """A proxy that is gone in the end, with everything that waits in it."""
    made = HttpProxy(port)
    try:
        yield made
    finally:
        made.close()
