"""`runstream dead-letters`: what could never be stored, why, and another try."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .backend import dead_letters_of, store_of
from .command import Group, session_of
from .failure import ExitCode, Failure
from .output import Column
from .text import age, moment, size

if TYPE_CHECKING:
    from runstream_ingest.dead_letter import DeadLetter

__all__ = ["dead_letters"]


@click.group("dead-letters", cls=Group)
def dead_letters() -> None:
    """Look at records that were refused, and try them again after a fix.

    A letter is named by its source: stream/partition/offset/time, as `list` prints it; its beginning is enough.
    """


@dead_letters.command("list")
@click.option("--reason", default="", metavar="TEXT", help="Only letters whose reason contains TEXT.")
@click.option("--all", "replayed", is_flag=True, help="Also those that were replayed.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many, oldest first.")
@click.pass_context
def list_(context: click.Context, reason: str, replayed: bool, limit: int) -> None:
    """List dead letters with their reasons."""
    session = session_of(context)
    rows: list[DeadLetter] = []
    more = 0
    with dead_letters_of(session) as store:
        for letter in store.letters():
            if reason in letter.reason and (replayed or not letter.replayed):
                if len(rows) < limit:
                    rows.append(letter)
                else:
                    more += 1
    if session.output.json:
        session.output.value([_described(letter) for letter in rows])
        return
    session.output.table(
        [
            Column("SOURCE", keep=True),
            Column("AGE"),
            Column("SIZE", right=True),
            Column("REPLAYED"),
            Column("REASON"),
        ],
        [
            [
                str(letter.source),
                age(letter.source.time_ms),
                size(None if letter.body is None else len(letter.body)),
                "yes" if letter.replayed else "",
                letter.reason,
            ]
            for letter in rows
        ],
        "No dead letters.",
    )
    if more:
        session.output.note(f"{more} more; --limit shows them")


@dead_letters.command()
@click.argument("source")
@click.pass_context
def show(context: click.Context, source: str) -> None:
    """Show one dead letter: its reason, its fields as far as they can be decoded, its bytes."""
    session = session_of(context)
    with dead_letters_of(session) as store:
        found = [letter for letter in store.letters() if str(letter.source).startswith(source)]
    exact = [letter for letter in found if str(letter.source) == source] or found
    if not exact:
        raise Failure(f"no dead letter {source!r}; `runstream dead-letters list --all` shows them", ExitCode.NOT_FOUND)
    if len(exact) > 1:
        some = ", ".join(str(letter.source) for letter in exact[:3])
        raise Failure(f"{source!r} names {len(exact)} letters: {some}, ...; give more of it", ExitCode.USAGE)
    letter = exact[0]
    event, fields, problem = _decoded(letter)
    body = b"" if letter.body is None else letter.body
    if session.output.json:
        session.output.value(
            _described(letter)
            | {
                "key": letter.key,
                "schema": None if letter.fingerprint is None else letter.fingerprint.hex(),
                "event": event,
                "fields": fields,
                "body": None if letter.body is None else base64.b64encode(body).decode("ascii"),
            }
        )
        return
    out = session.output
    out.fields(
        str(letter.source),
        [
            ("reason", letter.reason),
            ("logged", moment(letter.source.time_ms)),
            ("key", (letter.key or b"").decode("utf-8", "backslashreplace")),
            ("schema", f"{'none' if letter.fingerprint is None else letter.fingerprint.hex()} {event or 'unknown'}"),
            ("size", size(len(body)) if letter.body is not None else "nothing was kept"),
            ("replayed", "yes" if letter.replayed else "no"),
        ],
    )
    out.write()
    if fields is not None:
        out.fields("fields", [(name, _short(value)) for name, value in fields.items()])
    elif body:
        out.note(f"It cannot be decoded ({problem}); its first bytes:")
        for at in range(0, min(len(body), 256), 16):
            row = body[at : at + 16]
            out.write(f"  {at:04x}  {row.hex(' '):<47}  {''.join(chr(b) if 32 <= b < 127 else '.' for b in row)}")


@dead_letters.command()
@click.argument("source", nargs=-1)
@click.option("--reason", metavar="TEXT", help="Letters whose reason contains TEXT.")
@click.option("--all", "everything", is_flag=True, help="All that were not replayed yet.")
@click.pass_context
def replay(context: click.Context, source: tuple[str, ...], reason: str | None, everything: bool) -> None:
    """Put letters through the same checks into the store again: by SOURCE, by reason, or all.

    What is stored is marked as replayed. Repeating is harmless. Exit code 1 if some are still refused.
    """
    session = session_of(context)
    if not (source or reason is not None or everything):
        raise click.UsageError("say which: SOURCE ..., --reason TEXT or --all", context)
    choose = _choice(source, reason)
    with store_of(session) as store, dead_letters_of(session) as letters:
        from runstream_ingest.replay import replay as replay_letters

        result = replay_letters(store, letters, choose)
    told = {"replayed": result.stored, "still_refused": result.refused, "skipped": result.skipped}
    session.output.done(
        f"{result.stored} stored, {result.refused} still refused, {result.skipped} left out "
        "(replayed before, or nothing kept of them).",
        told,
    )
    if source and not result.stored and not result.refused:
        raise Failure("no dead letter of that name waits for a replay", ExitCode.NOT_FOUND)
    if result.refused:
        raise Failure(f"{result.refused} letters are still refused; `runstream dead-letters list` says why")


def _choice(sources: tuple[str, ...], reason: str | None) -> Callable[[DeadLetter], bool]:
    def choose(letter: DeadLetter) -> bool:
        if sources and not str(letter.source).startswith(sources):
            return False
        return reason is None or reason in letter.reason

    return choose


def _described(letter: DeadLetter) -> dict[str, Any]:
    return {
        "source": str(letter.source),
        "reason": letter.reason,
        "time": moment(letter.source.time_ms),
        "size_bytes": None if letter.body is None else len(letter.body),
        "replayed": letter.replayed,
    }


def _decoded(letter: DeadLetter) -> tuple[str | None, dict[str, Any] | None, str]:
    """Event name and fields of a letter as far as they can be had, and why not."""
    from runstream_schemas import codec

    if letter.body is None or letter.fingerprint is None:
        return None, None, "it carries no schema"
    known = codec.schemas().get(letter.fingerprint)
    if known is None:
        return None, None, "unknown schema"
    try:
        _, fields = codec.decode(letter.fingerprint, letter.body)
    except Exception as exc:
        return known.event, None, " ".join(str(exc).split()) or type(exc).__name__
    return known.event, dict(fields), ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]} ... ({len(text)} characters)"
