"""Runs the server: checks that it may start, says where it is, and serves until it is stopped."""

from __future__ import annotations

import json
import logging
import os
import resource
import socket
import sys
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp
from uvicorn.supervisors import Multiprocess

from runstream.errors import SettingsError

from .app import create_app
from .connection import BoundedProtocol
from .parts import client_settings
from .settings import ServerSettings

_FACTORY = "runstream_query.server.run:from_environment"


def _bind(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(1024)  # from now on connections wait for us instead of failing
    except OSError as exc:
        listener.close()
        raise SettingsError(
            f"cannot listen on {settings.host}:{settings.port}: {exc.strerror or exc}; choose another with --port"
        ) from exc
    listener.set_inheritable(True)
    return listener


def _environment(settings: ServerSettings) -> dict[str, str]:
    """`settings` as the variables from which worker processes read them."""
    found = {}
    for name, value in settings.model_dump(mode="json").items():
        if value is None:
            continue
        text = value if isinstance(value, str) else _json(value)
        found[f"RUNSTREAM_SERVER_{name.upper()}"] = text
    return found


def _config(app: ASGIApp | str, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        factory=isinstance(app, str),
        workers=settings.workers,
        http=BoundedProtocol,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=settings.shutdown_seconds,
        backlog=1024,
        ws="none",
    )


def limit_connections(settings: ServerSettings) -> None:
    """Set how many connections this process takes: by the settings and by the limit on open files, raised before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    BoundedProtocol.max_connections = min(settings.max_connections, max(8, soft - 256))


def from_environment() -> ASGIApp:
    """The application that a worker process serves: its settings come from RUNSTREAM_SERVER_* variables."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = ServerSettings()
    limit_connections(settings)
    return create_app(settings)


def _json(value: object) -> str:
    return json.dumps(value)


def serve(
    settings: ServerSettings,
    *,
    say: Callable[[str], None] | None = None,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; requests in work are finished first. Blocks; main thread only.

    Args:
        say: gets each line meant for a person; standard error by default.
        on_listening: called with the server's URL once the port is taken, before the first request is served.

    Raises:
        SettingsError: the settings do not fit, or the port is taken.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    problem = settings.problem()
    if problem is not None:
        raise SettingsError(problem)
    addresses = client_settings(settings)
    listener = _bind(settings)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{'localhost' if host in ('127.0.0.1', '::1') else shown}:{port}{settings.root_path}"
    say(f"runstream: serving {addresses.tracking_uri} on {url} (process {os.getpid()})")
    if settings.auth_file is None:
        who = "this machine" if settings.loopback else "THE NETWORK"
        say(f"runstream: no authentication: everybody on {who} may read and write")
    say(f'runstream: for MLflow clients: mlflow.set_tracking_uri("{url}")')
    try:
        if on_listening is not None:
            on_listening(url)
        if settings.workers == 1:
            limit_connections(settings)
            config = _config(create_app(settings), settings)
            uvicorn.Server(config).run(sockets=[listener])
        else:
            os.environ.update(_environment(settings))
            config = _config(_FACTORY, settings)
            Multiprocess(config, [listener]).run()
    finally:
        listener.close()
    say("runstream: stopped")
