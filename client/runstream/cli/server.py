"""`runstream server` and `runstream ui`: the web server, and who may use it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .command import Command, Group, session_of
from .failure import ExitCode, Failure, need

__all__ = ["server", "ui"]

_AUTH_FILE = click.option(
    "--file", "auth_file", type=click.Path(dir_okay=False, path_type=Path), default=Path("auth.json"),
    show_default=True, help="The file of users and tokens; mode 0600.",
)  # fmt: skip
_ROLE = click.option(
    "--role", type=click.Choice(["read", "write", "admin"]), default="write", show_default=True, help="What it may do."
)


def _options(command: Any) -> Any:
    for option in reversed(
        (
            click.option("--host", default=None, help="Address to listen on [127.0.0.1]; others need authentication."),
            click.option("--port", "-p", type=click.IntRange(0, 65_535), default=None, help="Port [5000]; 0 is any."),
            click.option("--workers", "-w", type=click.IntRange(1, 64), default=None, help="Server processes [1]."),
            click.option("--root-path", default=None, help="Path prefix behind a proxy, such as /runstream."),
            click.option(
                "--auth-file", type=click.Path(dir_okay=False, path_type=Path), default=None,
                help="Users and tokens (see `runstream server auth`); none: no authentication.",
            ),
            click.option(
                "--open-to-network", is_flag=True, default=None, help="Serve other machines without authentication."
            ),
            click.option("--allowed-hosts", default=None, metavar="HOST,...", help="Further Host headers to accept."),
            click.option("--allowed-origins", default=None, metavar="URL,...", help="Web origins that may write."),
            click.option(
                "--behind-proxy", is_flag=True, default=None,
                help="Take client address and https from X-Forwarded-For and -Proto, which the proxy must set itself.",
            ),
            click.option(
                "--audit-file", type=click.Path(dir_okay=False, path_type=Path), default=None,
                help="File for audit lines [standard error].",
            ),
            click.option("--serve-artifacts/--no-serve-artifacts", default=None, help="Serve artifacts [yes]."),
            click.option("--access-log/--no-access-log", default=None, help="One line per request [yes]."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def _serve(context: click.Context, options: dict[str, Any], *, browser: bool) -> None:
    with need("server"):
        from runstream_query.server.run import serve
        from runstream_query.server.settings import ServerSettings
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("allowed_hosts", "allowed_origins"):
        if name in given:
            given[name] = tuple(part.strip() for part in given[name].split(",") if part.strip())
    given["tracking_uri"] = session_of(context).settings.tracking_uri
    try:
        settings = ServerSettings(**given)
    except ValueError as exc:
        raise Failure(str(exc), ExitCode.USAGE) from exc
    serve(settings, on_listening=_open_browser if browser else None)


def _open_browser(url: str) -> None:
    import threading
    import webbrowser

    # The port is listening already, so the browser's first request waits for the server rather than failing.
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


@click.command(cls=Command)
@_options
@click.pass_context
def ui(context: click.Context, /, **options: Any) -> None:
    """Run the server and open it in the browser."""
    _serve(context, options, browser=True)


@click.group(cls=Group, invoke_without_command=True)
@_options
@click.pass_context
def server(context: click.Context, /, **options: Any) -> None:
    """Serve MLflow clients, SQL over HTTP and metrics for a data directory or Kafka and ClickHouse.

    Unmodified MLflow clients log to it with mlflow.set_tracking_uri("http://HOST:PORT"). It listens on this machine
    only, unless --auth-file or --open-to-network is given. SIGTERM and Ctrl-C finish the requests in work first.
    """
    if context.invoked_subcommand is None:
        _serve(context, options, browser=False)


@server.group(cls=Group)
def auth() -> None:
    """Keep the file of users and tokens; running servers notice a change within a second."""


def _load(path: Path) -> Any:
    with need("server"):
        from runstream_query.server.auth import AuthFile, AuthFileError
    try:
        return AuthFile.load(path) if path.exists() else AuthFile()
    except AuthFileError as exc:
        raise Failure(str(exc)) from exc


def _change(path: Path, change: Any) -> Any:
    with need("server"):
        from runstream_query.server.auth import AuthFile, AuthFileError
    try:
        return AuthFile.change(path, change)
    except AuthFileError as exc:
        raise Failure(str(exc), ExitCode.USAGE) from exc


@auth.command("add-user")
@click.argument("name")
@_ROLE
@_AUTH_FILE
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input instead of asking.")
def add_user(name: str, role: str, auth_file: Path, password_stdin: bool) -> None:
    """Add user NAME, or give them another password and role."""
    if password_stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    _change(auth_file, lambda content: content.add_user(name, password, role))
    click.echo(f"user {name} ({role}) in {auth_file}")


@auth.command("add-token")
@click.argument("name")
@_ROLE
@_AUTH_FILE
def add_token(name: str, role: str, auth_file: Path) -> None:
    """Make a token called NAME, for MLFLOW_TRACKING_TOKEN. It is shown once and kept only as a hash."""
    identity, token = _change(auth_file, lambda content: content.add_token(name, role))
    click.echo(f"token {identity} ({name}, {role}) in {auth_file}", err=True)
    click.echo(token)


@auth.command("revoke")
@click.argument("name")
@_AUTH_FILE
def revoke(name: str, auth_file: Path) -> None:
    """Remove the user or tokens called NAME, or the token with that id."""
    if not _change(auth_file, lambda content: content.revoke(name)):
        raise Failure(f"{auth_file} has no user or token {name!r}", ExitCode.NOT_FOUND)
    click.echo(f"revoked {name}")


_EXPERIMENTS = (
    click.option("--experiment", "experiment_name", metavar="NAME", help="The experiment of this name."),
    click.option("--experiment-id", metavar="ID", help="The experiment with this id (one that was renamed keeps it)."),
    click.option("--all-others", is_flag=True, help="All experiments for which there is no permission of its own."),
)


def _experiments(command: Any) -> Any:
    for option in reversed(_EXPERIMENTS):
        command = option(command)
    return command


def _experiment_id(experiment_name: str | None, experiment_id: str | None, all_others: bool) -> str | None:
    """The id that the options name; None for all others."""
    from runstream_schemas.identity import experiment_id as id_of

    if (experiment_name is not None) + (experiment_id is not None) + all_others != 1:
        raise Failure("give one of --experiment NAME, --experiment-id ID and --all-others", ExitCode.USAGE)
    return id_of(experiment_name) if experiment_name is not None else experiment_id


def _said(identity: str | None) -> str:
    return "all other experiments" if identity is None else f"experiment {identity}"


@auth.command("grant")
@click.argument("name")
@click.argument("permission", type=click.Choice(["none", "read", "edit", "manage"]))
@_experiments
@_AUTH_FILE
def grant(
    name: str,
    permission: str,
    experiment_name: str | None,
    experiment_id: str | None,
    all_others: bool,
    auth_file: Path,
) -> None:
    """Say what the user or token NAME may do with an experiment: none, read, edit (log, tag, rename, upload) or manage
    (delete and restore too).

    The role stays the upper bound. Whoever has a permission of this kind is limited: no SQL, and searches show what may
    be read. Experiments that they make become theirs to manage.
    """
    identity = _experiment_id(experiment_name, experiment_id, all_others)
    _change(auth_file, lambda content: content.grant(name, permission, identity))
    click.echo(f"{name}: {permission} for {_said(identity)}")


@auth.command("revoke-grant")
@click.argument("name")
@_experiments
@_AUTH_FILE
def revoke_grant(
    name: str, experiment_name: str | None, experiment_id: str | None, all_others: bool, auth_file: Path
) -> None:
    """Take a permission of NAME back: then the one for all others holds or, without one, the role."""
    identity = _experiment_id(experiment_name, experiment_id, all_others)
    if not _change(auth_file, lambda content: content.revoke_grant(name, identity)):
        raise Failure(f"{name} has no permission for {_said(identity)} of their own", ExitCode.NOT_FOUND)
    click.echo(f"{name}: no permission of their own for {_said(identity)}")


def _limits(entry: Any) -> str:
    with need("server"):
        from runstream_query.server.auth import permissions_of
    return "".join(f"  {one}" for one in permissions_of(entry))


@auth.command("list")
@_AUTH_FILE
def list_(auth_file: Path) -> None:
    """List users and tokens with their permissions; secrets are not kept and cannot be shown."""
    content = _load(auth_file)
    for name, user in sorted(content.users.items()):
        click.echo(f"user   {name}  {user.role}{_limits(user)}")
    for identity, token in content.tokens.items():
        click.echo(f"token  {token.name}  {token.role}  id {identity}{_limits(token)}")
