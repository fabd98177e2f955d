"""What is true of the store as a whole, and rare: deletions, purges, the artifact root. Read once per state of the log.

Most stores hold no deleted experiment and no purged run. Knowing that takes three joins out of every other statement,
each of which costs milliseconds to plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from .store import Store
from .visibility import Mark

__all__ = ["Facts", "KnownFacts"]

_FACTS: Final = """
SELECT 'root' AS kind, '' AS id, value AS text, toUInt128(0) AS version FROM settings FINAL WHERE name = 'artifact_root'
UNION ALL
SELECT 'purged', '', '', 0 FROM (SELECT 1 FROM purged_runs LIMIT 1)
UNION ALL
SELECT 'lifecycle', '', '', 0 FROM (SELECT 1 FROM run_facts WHERE lifecycle.version > 0 LIMIT 1)
UNION ALL
SELECT 'inputs', '', '', 0 FROM (SELECT 1 FROM input_facts LIMIT 1)
UNION ALL
SELECT 'run rows', '', '', count() FROM run_facts
UNION ALL
SELECT 'models', '', '', 0 FROM (SELECT 1 FROM model_links LIMIT 1)
UNION ALL
SELECT 'purged experiment', experiment_id, '', max(version) FROM purged_experiments GROUP BY experiment_id
UNION ALL
SELECT 'experiment', experiment_id, if(restored, 'active', f.lifecycle.stage),
    if(restored, f.last_start.version, f.lifecycle.version)
FROM
(
    SELECT experiment_id, max(lifecycle) AS lifecycle, max(last_start) AS last_start,
        lifecycle.stage = 'deleted' AND last_start.version > lifecycle.version AS restored
    FROM experiment_facts
    WHERE experiment_id IN (SELECT experiment_id FROM experiment_facts WHERE lifecycle.version > 0)
    GROUP BY experiment_id
) AS f"""


@dataclass(frozen=True, slots=True)
class Facts:
    """Rare facts about everything."""

    artifact_root: str = ""
    """URL below which relative artifact URIs lie."""
    any_purged: bool = False
    """Some run was purged: run ids must be held against `purged_runs`."""
    any_run_lifecycle: bool = False
    """Some run was deleted or restored on its own."""
    any_inputs: bool = True
    """Some run has inputs."""
    any_models: bool = True
    """Some run read or made a logged model."""
    run_rows: int = 0
    """Rows of facts about runs: at least as many as there are runs."""
    experiments: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """(stage, version) of every experiment that was ever deleted."""
    purged_experiments: Mapping[str, int] = field(default_factory=dict)
    """Version of the purge of every experiment that was ever purged; what was said of it up to there is gone."""
    mark: Mark | None = field(default=None, compare=False)
    """What of the log was visible when these facts were asked for."""

    @property
    def any_lifecycle(self) -> bool:
        """Some run may be deleted, by itself or with its experiment."""
        return self.any_run_lifecycle or bool(self.experiments)

    def stage(self, experiment_id: str, run_stage: str, run_version: int) -> str:
        """`active` or `deleted`: the newest of run and experiment lifecycle wins."""
        stage, version = self.experiments.get(experiment_id, ("", 0))
        return "deleted" if (stage if version > run_version else run_stage) == "deleted" else "active"

    def uri(self, stored: str) -> str:
        """A stored artifact URI as a full one."""
        return stored if "://" in stored else f"{self.artifact_root}/{stored}"


class KnownFacts:
    """Remembers the facts of one state of the log. Any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: Facts | None = None

    def at(self, mark: Mark) -> Facts:
        """The facts, read after the state of the log that `mark` names became visible."""
        known = self._known
        if known is not None and known.mark is not None and known.mark.control == mark.control:
            return replace(known, mark=mark)
        root, run_rows, present = "", 0, set()
        experiments: dict[str, tuple[str, int]] = {}
        purged_experiments: dict[str, int] = {}
        for kind, each, text, version in self._store.rows(_FACTS):
            if kind == "root":
                root = text
            elif kind == "run rows":
                run_rows = int(version)
            elif kind == "experiment":
                experiments[each] = (text, int(version))
            elif kind == "purged experiment":
                purged_experiments[each] = int(version)
            else:
                present.add(kind)
        facts = Facts(
            artifact_root=root,
            any_purged="purged" in present,
            any_run_lifecycle="lifecycle" in present,
            any_inputs="inputs" in present,
            any_models="models" in present,
            run_rows=run_rows,
            experiments=experiments,
            purged_experiments=purged_experiments,
            mark=mark,
        )
        self._known = facts
        return facts
