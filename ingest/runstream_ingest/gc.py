"""Physical removal of what was purged. Views hide purged runs at once; this gives their space back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from .store import Store

__all__ = ["purge", "purged_runs"]

_RUNS_A_STATEMENT: Final = 500


def purged_runs(store: Store) -> list[str]:
    """Ids of every run that was purged by itself or that began in an experiment before that one's purge."""
    rows = store.rows(
        """
        SELECT DISTINCT run_id FROM
        (
            SELECT run_id FROM purged_runs
            UNION ALL
            SELECT r.run_id AS run_id
            FROM (SELECT run_id, start FROM run_facts FINAL) AS r
            INNER JOIN
            (
                SELECT experiment_id, max(version) AS version FROM purged_experiments GROUP BY experiment_id
            ) AS p
                ON p.experiment_id = r.start.experiment_id
            WHERE r.start.inverse_version > 0 AND bitNot(r.start.inverse_version) <= p.version
        )
        ORDER BY run_id
        """
    )
    return [run_id for (run_id,) in rows]


def purge(store: Store, *, dry_run: bool) -> Mapping[str, int]:
    """Delete the rows of purged runs from every table; the record of the purge itself stays for late journals.

    Blocks until the parts are rewritten, which may take minutes on large tables. Safe to repeat, and beside a worker.
    Artifacts are not touched: they are the client's side (`runstream gc`).

    Args:
        dry_run: only count.

    Returns:
        Rows per table that were (or would be) deleted, before merging away duplicates; tables without any are left out.

    Raises:
        StoreBusy, StoreError: some tables may be done.
    """
    runs = purged_runs(store)
    deleted: dict[str, int] = {}
    for table in _tables(store):
        for first in range(0, len(runs), _RUNS_A_STATEMENT):
            where = f"run_id IN ({_literals(runs[first : first + _RUNS_A_STATEMENT])})"
            [(rows,)] = store.rows(f"SELECT count() FROM {table} WHERE {where}")
            if rows:
                deleted[table] = deleted.get(table, 0) + int(rows)
                if not dry_run:
                    # 2: wait for every replica.
                    store.execute(f"ALTER TABLE {table} DELETE WHERE {where} SETTINGS mutations_sync = 2")
    return deleted


def _tables(store: Store) -> Sequence[str]:
    rows = store.rows(
        "SELECT DISTINCT c.table FROM system.columns AS c "
        "INNER JOIN system.tables AS t ON t.database = c.database AND t.name = c.table "
        "WHERE c.database = {database:String} AND c.name = 'run_id' AND t.engine LIKE '%MergeTree' "
        "AND c.table != 'purged_runs' ORDER BY c.table",
        {"database": store.database},
    )
    return [table for (table,) in rows]


def _literals(texts: Sequence[str]) -> str:
    return ", ".join("'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'" for text in texts)
