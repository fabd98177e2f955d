"""`runstream runs`: list, show, compare, delete, restore, close-lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .command import ExperimentName, Group, RunId, session_of
from .output import Column
from .text import age, duration, moment, number, short_id, size

if TYPE_CHECKING:
    from ..entities import Run
    from .session import Session

__all__ = ["describe", "runs", "status_of"]

_FETCH = 1000
"""Runs of one page of a search."""
_FIXED_TAGS = ("mlflow.", "runstream.")
"""Beginnings of the tags that the client sets by itself: not shown as columns."""


@click.group(cls=Group)
def runs() -> None:
    """Look at runs, compare them, delete and restore them."""


@runs.command("list")
@click.option(
    "-e", "--experiment", "experiments", multiple=True, type=ExperimentName(), help="Only runs of it (repeatable)."
)
@click.option(
    "-f",
    "--filter",
    "filter_string",
    default="",
    metavar="EXPR",
    help="Such as \"metrics.loss < 0.1 and params.lr = '0.01'\".",
)
@click.option(
    "-o",
    "--order-by",
    multiple=True,
    metavar="EXPR",
    help="Such as 'metrics.loss ASC' (repeatable); newest first if left out.",
)
@click.option(
    "-m",
    "--metric",
    "metrics",
    multiple=True,
    metavar="KEY",
    help="Show this metric (repeatable); the most common ones if left out.",
)
@click.option(
    "-p",
    "--param",
    "params",
    multiple=True,
    metavar="KEY",
    help="Show this param (repeatable); the most common ones if left out.",
)
@click.option("--stage", type=click.Choice(["active", "deleted", "all"]), default="active", show_default=True)
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=25, show_default=True, help="At most so many.")
@click.pass_context
def list_(
    context: click.Context,
    experiments: tuple[str, ...],
    filter_string: str,
    order_by: tuple[str, ...],
    metrics: tuple[str, ...],
    params: tuple[str, ...],
    stage: str,
    limit: int,
) -> None:
    """List runs, newest first.

    \b
    runstream runs list --filter "metrics.val_accuracy > 0.95" --order-by "metrics.val_accuracy DESC"
    """
    from ..entities import ViewType

    session = session_of(context)
    view = {"active": ViewType.ACTIVE_ONLY, "deleted": ViewType.DELETED_ONLY, "all": ViewType.ALL}[stage]
    found: list[Run] = []
    token: str | None = None
    ids = session.experiment_ids(experiments, include_deleted=stage != "active")
    more = False
    while ids and len(found) < limit:
        wanted = min(limit - len(found), _FETCH)
        page = session.client.search_runs(ids, filter_string, view, wanted, list(order_by), token)
        found.extend(page)
        token = page.token
        more = token is not None
        if token is None:
            break
    if session.output.json:
        session.output.value([describe(run) for run in found])
        return
    names = {row["experiment_id"]: row["name"] for row in session.sql("SELECT experiment_id, name FROM experiments")}
    metric_keys = metrics or _common_keys([run.data.metrics for run in found], ("system/",))
    param_keys = params or _common_keys([run.data.params for run in found], ())
    columns = [
        Column("ID", keep=True),
        Column("NAME", style="bold"),
        Column("EXPERIMENT"),
        Column("STATUS"),
        Column("STARTED"),
        Column("TOOK", right=True),
        *(Column(key, right=True) for key in metric_keys),
        *(Column(key, right=True, style="cyan") for key in param_keys),
    ]
    session.output.table(
        columns,
        [
            [
                short_id(run.info.run_id),
                run.info.run_name,
                names.get(run.info.experiment_id, run.info.experiment_id),
                status_of(run),
                age(run.info.start_time),
                _took(run),
                *(number(run.data.metrics.get(key)) for key in metric_keys),
                *(run.data.params.get(key, "") for key in param_keys),
            ]
            for run in found
        ],
        "No runs found." if filter_string or experiments else "No runs yet. `runstream demo` makes some.",
    )
    if more:
        session.output.note(f"These are the first {len(found)}; --limit shows more")


@runs.command()
@click.argument("run", type=RunId())
@click.pass_context
def show(context: click.Context, run: str) -> None:
    """Show one run: state, source, params, latest metrics, tags, data sets, artifacts."""
    session = session_of(context)
    found = session.run(run)
    run_id = found.info.run_id
    metrics = session.sql(
        "SELECT key, value, min, max, step, timestamp FROM latest_metrics WHERE run_id = {id:String} ORDER BY key",
        id=run_id,
    )
    files = session.sql(
        "SELECT path, size_bytes, logged_at FROM artifacts WHERE run_id = {id:String} ORDER BY path", id=run_id
    )
    if session.output.json:
        session.output.value(describe(found) | {"latest_metrics": metrics, "artifacts": files})
        return
    out, info = session.output, found.info
    lost = " (its process has not been heard of for a while)" if info.lost else ""
    out.fields(
        info.run_name,
        [
            ("run", info.run_id),
            ("experiment", info.experiment_id),
            ("status", status_of(found) + lost),
            ("started", f"{moment(info.start_time)}, {age(info.start_time)}"),
            ("took", _took(found)),
            ("user", info.user_id),
            ("source", info.source_name),
            ("commit", info.source_version),
            ("artifacts", info.artifact_uri),
            *([("parent", info.parent_run_id)] if info.parent_run_id else []),
            *(
                [("deleted", "yes; `runstream runs restore` brings it back")]
                if info.lifecycle_stage == "deleted"
                else []
            ),
        ],
    )
    if found.data.params:
        out.write()
        out.fields("params", sorted(found.data.params.items()))
    if metrics:
        out.write()
        out.heading("metrics")
        out.table(
            [Column("  KEY"), *(Column(title, right=True) for title in ("LAST", "MIN", "MAX", "STEP"))],
            [[f"  {row['key']}", *(number(row[name]) for name in ("value", "min", "max", "step"))] for row in metrics],
        )
    own = {key: value for key, value in found.data.tags.items() if not key.startswith(_FIXED_TAGS)}
    if own:
        out.write()
        out.fields("tags", sorted(own.items()))
    if found.inputs.dataset_inputs:
        out.write()
        data = [used.dataset for used in found.inputs.dataset_inputs]
        out.fields("data sets", [(each.name, f"{each.digest}  {each.source}") for each in data])
    if files:
        out.write()
        out.fields("artifacts", [(row["path"], size(row["size_bytes"])) for row in files])


@runs.command()
@click.argument("run", nargs=-1, required=True, type=RunId())
@click.option("--all", "show_all", is_flag=True, help="Show equal values, too.")
@click.pass_context
def compare(context: click.Context, run: tuple[str, ...], show_all: bool) -> None:
    """Compare runs side by side: params, tags and latest metrics that differ."""
    session = session_of(context)
    if len(run) < 2:
        raise click.UsageError("compare needs at least two runs", context)
    found = [session.run(text) for text in run]
    rows = _comparison(found, show_all=show_all)
    if session.output.json:
        session.output.value(
            {
                "runs": [describe(each) for each in found],
                "rows": [{"kind": kind, "key": key, "values": values} for kind, key, values in rows],
            }
        )
        return
    columns = [
        Column("KIND", style="dim"),
        Column("KEY"),
        *(Column(each.info.run_name or short_id(each.info.run_id), right=True) for each in found),
    ]
    shown = [
        [kind, key, *(number(v) if isinstance(v, float) else str(v or "") for v in values)]
        for kind, key, values in rows
    ]
    session.output.table(columns, shown, "These runs do not differ; --all shows what they have.")


@runs.command()
@click.argument("run", nargs=-1, required=True, type=RunId())
@click.pass_context
def delete(context: click.Context, run: tuple[str, ...]) -> None:
    """Delete runs; `restore` brings them back until `runstream gc` removes them for good."""
    session = session_of(context)
    ids = [session.run_id(text) for text in run]
    with session.writing():
        for run_id in ids:
            session.client.delete_run(run_id)
    session.output.done(f"Deleted {_count(ids)}.", {"deleted": ids})


@runs.command()
@click.argument("run", nargs=-1, required=True, type=RunId())
@click.pass_context
def restore(context: click.Context, run: tuple[str, ...]) -> None:
    """Bring back deleted runs."""
    session = session_of(context)
    ids = [session.run_id(text) for text in run]
    with session.writing():
        for run_id in ids:
            session.client.restore_run(run_id)
    session.output.done(f"Restored {_count(ids)}.", {"restored": ids})


@runs.command("close-lost")
@click.option(
    "-e", "--experiment", "experiments", multiple=True, type=ExperimentName(), help="Only runs of it (repeatable)."
)
@click.option(
    "--status", type=click.Choice(["KILLED", "FAILED"]), default="KILLED", show_default=True, help="What they become."
)
@click.option("--dry-run", is_flag=True, help="Only show them.")
@click.pass_context
def close_lost(context: click.Context, experiments: tuple[str, ...], status: str, dry_run: bool) -> None:
    """End runs that are RUNNING but whose process has not been heard of for two minutes.

    Their end is the last sign of life. Should such a process come back, what it says of its run wins.
    """
    session = session_of(context)
    chosen = [session.experiment(name).experiment_id for name in experiments]
    found = session.sql(
        "SELECT run_id, name, experiment_name, heartbeat_at, toUnixTimestamp64Milli(heartbeat_at) AS heartbeat_ms "
        "FROM runs WHERE lost AND (empty({ids:Array(String)}) OR experiment_id IN {ids:Array(String)}) "
        "ORDER BY heartbeat_at",
        ids=chosen,
    )
    if not dry_run:
        _close(session, found, status)
    if session.output.json:
        rows = [{key: row[key] for key in ("run_id", "name", "experiment_name", "heartbeat_at")} for row in found]
        session.output.value({"dry_run": dry_run, "status": status, "runs": rows})
        return
    session.output.table(
        [Column("ID", keep=True), Column("NAME", style="bold"), Column("EXPERIMENT"), Column("LAST SIGN OF LIFE")],
        [[short_id(row["run_id"]), row["name"], row["experiment_name"], age(row["heartbeat_ms"])] for row in found],
        "No lost runs.",
    )
    if found and not dry_run:
        session.output.write(f"{_count([row['run_id'] for row in found])} ended as {status}.")


def _close(session: Session, found: Sequence[dict[str, Any]], status: str) -> None:
    """Say that `found` ended at their last heartbeat.

    The version is just above the heartbeat's: newer than everything that was heard of the run, older than a FINISHED
    that still waits in a journal somewhere.
    """
    from runstream_schemas.identity import Version

    recorder = session.writer().recorder
    with session.writing():
        for row in found:
            heartbeat = int(row["heartbeat_ms"])
            version = Version(heartbeat, 0xFFFFFFFF, 0)
            recorder.control(
                "run_updated",
                {
                    "run_id": row["run_id"],
                    "status": status,
                    "ended_at": heartbeat,
                    "name": "",
                    "lifecycle_stage": "",
                    "time_ms": version.time_ms,
                    "seq": version.seq,
                    "writer": version.writer,
                },
            )


def status_of(run: Run) -> str:
    """The status as people see it: LOST for a running run whose process is gone."""
    return "LOST" if run.info.lost else str(run.info.status)


def describe(run: Run) -> dict[str, Any]:
    """The JSON shape of a run: the columns of the `runs` view, and metrics, params, tags and data sets by key."""
    info = run.info
    return {
        "run_id": info.run_id,
        "experiment_id": info.experiment_id,
        "name": info.run_name,
        "status": str(info.status),
        "lost": info.lost,
        "lifecycle_stage": info.lifecycle_stage,
        "user": info.user_id,
        "source_name": info.source_name,
        "source_type": info.source_type,
        "source_version": info.source_version,
        "started_at": moment(info.start_time),
        "ended_at": None if info.end_time is None else moment(info.end_time),
        "heartbeat_at": None if info.heartbeat_time is None else moment(info.heartbeat_time),
        "parent_run_id": info.parent_run_id or None,
        "artifact_uri": info.artifact_uri,
        "metrics": dict(sorted(run.data.metrics.items())),
        "params": dict(sorted(run.data.params.items())),
        "tags": dict(sorted(run.data.tags.items())),
        "datasets": [
            {
                "name": used.dataset.name,
                "digest": used.dataset.digest,
                "source": used.dataset.source,
                "source_type": used.dataset.source_type,
                "context": next((tag.value for tag in used.tags if tag.key == "mlflow.data.context"), None),
            }
            for used in run.inputs.dataset_inputs
        ],
    }


def _took(run: Run) -> str:
    """How long the run took; of a running one how long it runs, of a lost one until it was last heard of."""
    import time

    info = run.info
    end = info.end_time
    if end is None:
        end = info.heartbeat_time if info.lost else time.time_ns() // 1_000_000
    return duration((end - info.start_time) / 1000) if end is not None else ""


def _common_keys(maps: Sequence[Any], hidden: tuple[str, ...]) -> list[str]:
    """Keys by how many runs have them, then by name; keys of one value everywhere come last."""
    seen = Counter(key for values in maps for key in values if not key.startswith(hidden or ("\0",)))
    return sorted(seen, key=lambda key: (-seen[key], _constant(maps, key), key))


def _constant(maps: Sequence[Any], key: str) -> bool:
    return len(maps) > 1 and len({repr(values[key]) for values in maps if key in values}) == 1


def _comparison(found: Sequence[Run], *, show_all: bool) -> list[tuple[str, str, list[Any]]]:
    rows: list[tuple[str, str, list[Any]]] = []
    kinds: tuple[tuple[str, list[Any]], ...] = (
        ("param", [run.data.params for run in found]),
        ("metric", [run.data.metrics for run in found]),
        ("tag", [{k: v for k, v in run.data.tags.items() if not k.startswith(_FIXED_TAGS)} for run in found]),
    )
    for kind, maps in kinds:
        for key in sorted({key for values in maps for key in values}):
            values = [each.get(key) for each in maps]
            if show_all or len({repr(value) for value in values}) > 1:
                rows.append((kind, key, values))
    return rows


def _count(ids: Sequence[str]) -> str:
    return f"run {ids[0]}" if len(ids) == 1 else f"{len(ids)} runs"
