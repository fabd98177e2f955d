"""`runstream gc`: remove deleted runs and experiments for good."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, Final

import click

from .backend import store_of
from .command import Command, session_of
from .failure import ExitCode, Failure
from .output import Column
from .text import age, short_id, size

if TYPE_CHECKING:
    from .session import Session

__all__ = ["gc", "seconds_of"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_AGE: Final = re.compile(r"(?:\d+[smhdw])+")

_RUNS: Final = """
SELECT r.run_id AS run_id, r.name AS name, r.experiment_id AS experiment_id, r.experiment_name AS experiment_name,
    r.deleted_at AS deleted_at, r.artifact_uri AS artifact_uri, a.files AS files, a.bytes AS bytes
FROM runs AS r
LEFT JOIN (SELECT run_id, count() AS files, sum(size_bytes) AS bytes FROM artifacts GROUP BY run_id) AS a
    ON a.run_id = r.run_id
WHERE r.lifecycle_stage = 'deleted' AND r.deleted_at <= fromUnixTimestamp64Milli({before:Int64}, 'UTC')
ORDER BY r.deleted_at
"""
_EXPERIMENTS: Final = """
SELECT experiment_id, name, deleted_at FROM experiments
WHERE lifecycle_stage = 'deleted' AND deleted_at <= fromUnixTimestamp64Milli({before:Int64}, 'UTC')
ORDER BY deleted_at
"""


class _Age(click.ParamType[float]):
    """A time span such as `30d` or `1d12h`, in seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return seconds_of(str(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


def seconds_of(text: str) -> float:
    """Seconds of `30d`, `1d12h`, `90s`.

    Raises:
        ValueError: not such a text.
    """
    if not _AGE.fullmatch(text):
        raise ValueError(f"{text!r} is no time span; write 30d, 12h or 1d12h (units s, m, h, d, w)")
    return float(sum(int(part[:-1]) * _UNITS[part[-1]] for part in re.findall(r"\d+[smhdw]", text)))


@click.command(cls=Command)
@click.option(
    "--older-than",
    type=_Age(),
    default=0.0,
    metavar="AGE",
    help="Only what was deleted at least this long ago: 30d, 12h, 1d12h.",
)
@click.option("--yes", is_flag=True, help="Do it. Without it, gc only shows what it would remove.")
@click.pass_context
def gc(context: click.Context, older_than: float, yes: bool) -> None:
    """Remove deleted runs and experiments for good, with their artifacts. Shows what it would do unless --yes is given.

    What is removed never comes back, not even when a late process still sends data of it. Experiments are removed
    only together with all of their runs.
    """
    session = session_of(context)
    before = time.time_ns() // 1_000_000 - int(older_than * 1000)
    runs = session.sql(_RUNS, before=before)
    experiments = _empty_experiments(session, session.sql(_EXPERIMENTS, before=before), runs)
    out = session.output
    if not yes:
        _show(session, runs, experiments)
        return
    failed = _remove(session, runs, experiments)
    rows = _remove_rows(session)
    removed = len(runs) - len(failed)
    out.done(
        f"Removed {removed} runs and {len(experiments)} experiments for good, {sum(rows.values())} rows in the store.",
        {
            "dry_run": False,
            "rows": rows,
            "runs": [row["run_id"] for row in runs if row["run_id"] not in failed],
            "experiments": [row["experiment_id"] for row in experiments],
            "failed": [{"run_id": run_id, "error": error} for run_id, error in failed.items()],
        },
    )
    if failed:
        first = next(iter(failed.values()))
        raise Failure(
            f"artifacts of {len(failed)} runs could not be removed, so these runs stay: {first}", ExitCode.FAILED
        )


def _empty_experiments(
    session: Session, experiments: list[dict[str, Any]], runs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Those of `experiments` that have no run besides `runs`."""
    if not experiments:
        return []
    ids = [row["experiment_id"] for row in experiments]
    kept = session.sql(
        "SELECT DISTINCT experiment_id FROM runs WHERE experiment_id IN {ids:Array(String)} "
        "AND run_id NOT IN {going:Array(String)}",
        ids=ids,
        going=[row["run_id"] for row in runs],
    )
    stay = {row["experiment_id"] for row in kept}
    return [row for row in experiments if row["experiment_id"] not in stay]


def _show(session: Session, runs: list[dict[str, Any]], experiments: list[dict[str, Any]]) -> None:
    out = session.output
    if out.json:
        out.value({"dry_run": True, "runs": runs, "experiments": experiments})
        return
    out.table(
        [
            Column("RUN", keep=True),
            Column("NAME", style="bold"),
            Column("EXPERIMENT"),
            Column("DELETED"),
            Column("FILES", right=True),
            Column("SIZE", right=True),
        ],
        [
            [
                short_id(row["run_id"]),
                row["name"],
                row["experiment_name"],
                age(int(row["deleted_at"].timestamp() * 1000)),
                str(row["files"] or 0),
                size(int(row["bytes"] or 0)),
            ]
            for row in runs
        ],
        "No deleted runs of that age.",
    )
    for row in experiments:
        out.write(f"experiment {row['name']} ({row['experiment_id']})")
    if runs or experiments:
        out.note("Nothing was removed. `runstream gc --yes` removes all of this for good.")


def _remove_rows(session: Session) -> dict[str, int]:
    """Delete the rows of everything that was ever purged; rows by table. The views have hidden them before."""
    with store_of(session) as store:
        from runstream_ingest.gc import purge

        session.sql("SELECT 1")  # waits until the store has seen the purges
        with session.output.progress("rewriting tables"):
            return dict(purge(store, dry_run=False))


def _remove(session: Session, runs: list[dict[str, Any]], experiments: list[dict[str, Any]]) -> dict[str, str]:
    """Artifacts first, then the run: a run whose files could not be removed stays, so that gc can be run again."""
    from ..errors import ArtifactError
    from ..storage.store import open_store

    writer = session.writer()
    failed: dict[str, str] = {}
    with session.writing(), session.output.progress("removing", total=len(runs)) as advance:
        for done, row in enumerate(runs):
            try:
                if row["artifact_uri"]:
                    open_store(row["artifact_uri"]).delete("")
            except (ArtifactError, OSError) as exc:
                failed[row["run_id"]] = str(exc)
            else:
                writer.purge("run", row["run_id"])
            advance(done + 1, row["name"])
        for row in experiments:
            if not any(run["run_id"] in failed and run["experiment_id"] == row["experiment_id"] for run in runs):
                writer.purge("experiment", row["experiment_id"])
    return failed
