"""`python -m runstream_ingest`: the worker's processes.

    local DATA_DIR [--idle-exit SECONDS] [--port PORT]   the local store process of a data directory
    kafka                                                a worker from Kafka into a ClickHouse server
    migrate                                              bring the ClickHouse database up to date
    settings                                             every setting with its default and meaning

Exit codes: 0 done, 1 failed, 2 wrong use or settings; `local` has its own (see `local.process`).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import IngestError, SettingsError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; blocks until it ends. Main thread only."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "local":
            from .local.process import serve

            return serve(Path(given.data_directory), given.idle_exit, given.port)
        if given.command == "settings":
            return _settings()
        if given.command == "migrate":
            return _migrate()
        from .service import run

        return run()
    except SettingsError as exc:
        print(f"runstream: {exc}", file=sys.stderr)
        return 2
    except IngestError as exc:
        print(f"runstream: {exc}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runstream_ingest", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    local = commands.add_parser("local", help="the local store process of a data directory")
    local.add_argument("data_directory")
    local.add_argument("--idle-exit", type=float, default=60.0, metavar="SECONDS", help="leave when idle; 0 stays")
    local.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0 takes a free one")
    commands.add_parser("kafka", help="a worker from Kafka into a ClickHouse server")
    commands.add_parser("migrate", help="bring the ClickHouse database up to date")
    commands.add_parser("settings", help="every setting with its default and meaning")
    return parser


def _settings() -> int:
    from .config import IngestSettings

    for name, field in IngestSettings.model_fields.items():
        default = field.default.get_secret_value() if hasattr(field.default, "get_secret_value") else field.default
        print(f"RUNSTREAM_{name.upper()}  (default: {default or 'none'})\n    {field.description}")
    return 0


def _migrate() -> int:
    from .config import load
    from .migration import migrate
    from .store import connect

    settings = load()
    store = connect(settings.store_address(), create_database=True, timeout_seconds=settings.store_timeout_seconds)
    try:
        cluster = settings.store_cluster or None
        applied = migrate(store, "Replicated" if cluster else "MergeTree", cluster)
    finally:
        store.close()
    for migration in applied:
        print(f"applied migration {migration.version} ({migration.name})")
    if not applied:
        print("the database is up to date")
    return 0


if __name__ == "__main__":
    logging.captureWarnings(True)
    sys.exit(main())
