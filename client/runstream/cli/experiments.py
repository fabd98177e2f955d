"""`runstream experiments`: list, show, create, rename, delete, restore."""

from __future__ import annotations

from typing import Any

import click

from .command import ExperimentName, Group, session_of
from .output import Column
from .text import age, moment

__all__ = ["experiments"]

_LIST = """
SELECT e.experiment_id AS experiment_id, e.name AS name, e.lifecycle_stage AS lifecycle_stage,
    e.created_at AS created_at, e.updated_at AS updated_at, e.artifact_uri AS artifact_uri, e.tags AS tags,
    r.runs AS runs, r.running AS running, r.last_started AS last_run_at
FROM experiments AS e
LEFT JOIN (
    SELECT experiment_id, count() AS runs, countIf(status = 'RUNNING' AND NOT lost) AS running,
        toNullable(max(started_at)) AS last_started
    FROM runs WHERE lifecycle_stage = 'active' GROUP BY experiment_id
) AS r ON r.experiment_id = e.experiment_id
WHERE {stage:String} = 'all' OR e.lifecycle_stage = {stage:String}
ORDER BY r.last_started DESC NULLS LAST, e.name
LIMIT {limit:UInt32}
"""


@click.group(cls=Group)
def experiments() -> None:
    """Look at and change experiments (named groups of runs)."""


@experiments.command("list")
@click.option("--stage", type=click.Choice(["active", "deleted", "all"]), default="active", show_default=True)
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="At most so many.")
@click.pass_context
def list_(context: click.Context, stage: str, limit: int) -> None:
    """List experiments, the one with the newest run first."""
    session = session_of(context)
    rows = session.sql(_LIST, stage=stage, limit=limit)
    if session.output.json:
        session.output.value([_described(row) for row in rows])
        return
    columns = [
        Column("NAME", style="bold"),
        Column("ID", keep=True),
        Column("RUNS", right=True),
        Column("RUNNING", right=True),
        Column("LAST RUN"),
        Column("STAGE"),
    ]
    session.output.table(
        columns,
        [
            [
                row["name"],
                row["experiment_id"],
                str(row["runs"] or 0),
                str(row["running"] or 0),
                age(_ms(row["last_run_at"])),
                row["lifecycle_stage"],
            ]
            for row in rows
        ],
        "No experiments yet. `runstream demo` makes some.",
    )


@experiments.command()
@click.argument("experiment", type=ExperimentName())
@click.pass_context
def show(context: click.Context, experiment: str) -> None:
    """Show one experiment with its tags."""
    session = session_of(context)
    found = session.experiment(experiment)
    counts = session.sql(
        "SELECT status, count() AS runs FROM runs WHERE experiment_id = {id:String} AND lifecycle_stage = 'active' "
        "GROUP BY status ORDER BY status",
        id=found.experiment_id,
    )
    runs = {str(row["status"]): int(row["runs"]) for row in counts}
    value = {
        "experiment_id": found.experiment_id,
        "name": found.name,
        "lifecycle_stage": found.lifecycle_stage,
        "artifact_uri": found.artifact_location,
        "created_at": None if found.creation_time is None else moment(found.creation_time),
        "updated_at": None if found.last_update_time is None else moment(found.last_update_time),
        "tags": dict(found.tags),
        "runs": runs,
    }
    if session.output.json:
        session.output.value(value)
        return
    pairs = [(key, str(value[key] or "")) for key in ("experiment_id", "lifecycle_stage", "created_at", "artifact_uri")]
    pairs.append(("runs", ", ".join(f"{count} {status}" for status, count in runs.items()) or "none"))
    session.output.fields(found.name, pairs + [(f"tag {key}", text) for key, text in sorted(found.tags.items())])


@experiments.command()
@click.argument("name")
@click.option("--artifact-location", metavar="URL", help="Where artifacts of its runs go (any fsspec URL).")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="A tag; may be repeated.")
@click.pass_context
def create(context: click.Context, name: str, artifact_location: str | None, tags: tuple[str, ...]) -> None:
    """Create the experiment NAME."""
    session = session_of(context)
    with session.writing():
        made = session.client.create_experiment(name, artifact_location=artifact_location, tags=_tags(tags) or None)
    session.output.done(f"Created experiment {name} ({made}).", {"experiment_id": made, "name": name})


@experiments.command()
@click.argument("experiment", type=ExperimentName())
@click.argument("new_name")
@click.pass_context
def rename(context: click.Context, experiment: str, new_name: str) -> None:
    """Give EXPERIMENT another name."""
    session = session_of(context)
    found = session.experiment(experiment)
    with session.writing():
        session.client.rename_experiment(found.experiment_id, new_name)
    session.output.done(
        f"Renamed {found.name} to {new_name}.", {"experiment_id": found.experiment_id, "name": new_name}
    )


@experiments.command()
@click.argument("experiment", type=ExperimentName())
@click.pass_context
def delete(context: click.Context, experiment: str) -> None:
    """Delete EXPERIMENT and hide its runs; `restore` brings them back until `runstream gc`."""
    session = session_of(context)
    found = session.experiment(experiment)
    with session.writing():
        session.client.delete_experiment(found.experiment_id)
    session.output.done(
        f"Deleted {found.name}. `runstream experiments restore {found.experiment_id}` brings it back.",
        {"deleted": [found.experiment_id]},
    )


@experiments.command()
@click.argument("experiment", type=ExperimentName())
@click.pass_context
def restore(context: click.Context, experiment: str) -> None:
    """Bring back the deleted EXPERIMENT with its runs."""
    session = session_of(context)
    found = session.experiment(experiment)
    with session.writing():
        session.client.restore_experiment(found.experiment_id)
    session.output.done(f"Restored {found.name}.", {"restored": [found.experiment_id]})


def _tags(pairs: tuple[str, ...]) -> dict[str, str]:
    tags: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="'--tag'")
        tags[key] = value
    return tags


def _described(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "runs": row["runs"] or 0, "running": row["running"] or 0}


def _ms(value: Any) -> int | None:
    return None if value is None else int(value.timestamp() * 1000)
