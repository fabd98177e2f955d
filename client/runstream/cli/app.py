"""The root of the command line: its groups, and how every invocation ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

import click

from .command import LazyGroup
from .failure import ExitCode, Failure, debugging, explain

__all__ = ["root", "run"]

PROGRAM: Final = "runstream"
COMPLETE_VARIABLE: Final = "_RUNSTREAM_COMPLETE"
"""The shell's completion script calls the command with this variable set."""

_COMMANDS: Final = {
    "experiments": "experiments:experiments",
    "runs": "runs:runs",
    "metrics": "metrics:metrics",
    "artifacts": "artifacts:artifacts",
    "sql": "sql:sql",
    "tail": "tail:tail",
    "demo": "demo:demo",
    "sync": "sync:sync",
    "gc": "gc:gc",
    "doctor": "doctor:doctor",
    "server": "server:server",
    "ui": "server:ui",
    "migrate": "migrate:migrate",
    "ingest": "ingest:ingest",
    "dead-letters": "dead_letters:dead_letters",
    "rebuild": "rebuild:rebuild",
    "completion": "completion:completion",
    "version": "version:version",
}

root = LazyGroup(
    name=PROGRAM,
    commands_of=_COMMANDS,
    help="Track experiments: look at runs, compare them, query them with SQL, and look after the store.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use, 3 not found, 4 unavailable, 5 part not installed, "
    "130 interrupted. RUNSTREAM_DEBUG=1 shows stack traces.",
)


def run(arguments: Sequence[str]) -> int:
    """Run one invocation; every error becomes one sentence on stderr and an exit code."""
    wants_json = "--json" in arguments
    try:
        instruction = os.environ.get(COMPLETE_VARIABLE)
        if instruction:
            from click.shell_completion import shell_complete

            return shell_complete(root, {}, PROGRAM, COMPLETE_VARIABLE, instruction)
        # Not `root.main`: its own ending of broken pipes and interrupts has changed between releases of click.
        with root.make_context(PROGRAM, list(arguments)) as context:
            root.invoke(context)
        sys.stdout.flush()
        return ExitCode.OK
    except click.exceptions.Exit as exc:
        return _flushed(exc.exit_code)
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        return ExitCode.USAGE
    except click.UsageError as exc:
        return _fail(Failure(_usage(exc), ExitCode.USAGE), wants_json=wants_json)
    except click.ClickException as exc:
        return _fail(Failure(exc.format_message()), wants_json=wants_json)
    except (click.Abort, KeyboardInterrupt):
        if sys.stderr.isatty():
            sys.stderr.write("\n")  # behind the ^C that the terminal shows
        _silence_stdout()
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return ExitCode.BROKEN_PIPE
    except Exception as exc:
        if debugging():
            raise
        return _fail(explain(exc), wants_json=wants_json)


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        return ExitCode.BROKEN_PIPE
    return code


def _usage(error: click.UsageError) -> str:
    message = error.format_message().rstrip(".")
    command = error.ctx.command_path if error.ctx is not None else "runstream"
    return message if "--help" in message else f"{message}; see `{command} --help`"


def _fail(failure: Failure, *, wants_json: bool) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
    if wants_json:
        body = {"error": {"code": failure.code.label, "message": str(failure)}}
        sys.stderr.write(json.dumps(body, ensure_ascii=False) + "\n")
    else:
        label = "\x1b[31merror:\x1b[0m" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else "error:"
        sys.stderr.write(f"{label} {failure}\n")
    return failure.code


def _silence_stdout() -> None:
    """Send what is still buffered nowhere: the reader is gone, and the interpreter would complain at its exit."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
