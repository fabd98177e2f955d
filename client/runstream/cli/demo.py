"""`runstream demo`: train real models in parallel and query what they logged."""

from __future__ import annotations

import click

from .command import Command, session_of
from .failure import Failure, need

__all__ = ["demo"]


@click.command(cls=Command)
@click.option(
    "--processes", type=click.IntRange(1, 64), default=10, show_default=True, help="Training processes at once."
)
@click.option("--no-hints", is_flag=True, help="Leave out what to try next.")
@click.pass_context
def demo(context: click.Context, processes: int, no_hints: bool) -> None:
    """Train 10 scikit-learn models in parallel, then query what they logged (about half a minute)."""
    session = session_of(context)
    with need("demo"):
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    from ..demo.session import run_demo

    if not run_demo(session, processes=processes, hints=not no_hints):
        raise Failure("not every model was trained and found again; see above")
