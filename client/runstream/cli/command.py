"""click classes with what every runstream command has: --json, --tracking-uri, and parts loaded when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

import click

from .session import Session

__all__ = ["Command", "Group", "LazyGroup", "RunId", "session_of"]

_CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def session_of(context: click.Context) -> Session:
    """The session of this invocation, made at its first use."""
    return context.ensure_object(Session)


def _set_json(context: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        session_of(context).output.json = True


def _set_tracking_uri(context: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        session_of(context).tracking_uri = value


def _common() -> list[click.Parameter]:
    return [
        click.Option(
            ["--json"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_set_json,
            help="Print JSON, also for errors (on stderr).",
        ),
        click.Option(
            ["--tracking-uri"],
            metavar="URI",
            expose_value=False,
            is_eager=True,
            callback=_set_tracking_uri,
            help="Data directory or kafka://host:port/PREFIX [env: RUNSTREAM_TRACKING_URI].",
        ),
    ]


class Command(click.Command):
    """A command with the common options; they may stand before the group's name, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = _CONTEXT | kwargs.get("context_settings", {})
        super().__init__(*args, **kwargs)
        self.params.extend(_common())


class Group(click.Group):
    """A group of `Command`s."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = _CONTEXT | kwargs.get("context_settings", {})
        super().__init__(*args, **kwargs)
        self.params.extend(_common())


class LazyGroup(Group):
    """The root: knows the names and first lines of its commands, and imports one when it runs."""

    def __init__(self, *args: Any, commands_of: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands_of = commands_of
        """Command name -> `module:attribute` below this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the help page."""
        return list(self.commands_of)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command called `cmd_name`, imported now."""
        place = self.commands_of.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        command = getattr(import_module(f"{__package__}.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, naming the nearest command where the name is unknown."""
        if args and args[0] not in self.commands_of and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.commands_of, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"no command {args[0]!r}.{hint} `runstream --help` lists them all", ctx)
        return super().resolve_command(ctx, args)


class RunId(click.ParamType[str]):
    """A run: its id, an unambiguous beginning of it, or a run name that only one run has. Completed by the shell."""

    name = "run"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Ids that begin with `incomplete`, newest first, with their names as help; none where that is not cheap."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(value, help=text) for value, text in session_of(ctx).complete_runs(incomplete)]


class ExperimentName(click.ParamType[str]):
    """An experiment: its name or id. Completed by the shell."""

    name = "experiment"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Names that begin with `incomplete`; none where that is not cheap."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in session_of(ctx).complete_experiments(incomplete)]
