"""Writes checked events of runs and experiments to a recorder. The fluent API and `Client` both stand on it.

Nothing here reads the store or blocks on the network; what returned survives a kill of the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from runstream_schemas import identity
from runstream_schemas.identity import Version
from runstream_schemas.limits import MAX_BODY_BYTES, MAX_RUN_ID_CHARS
from runstream_schemas.names import EventName

from .config import Settings
from .entities import Dataset, RunInfo
from .errors import InvalidInputError
from .validation import check_experiment_tags, check_key, check_params, check_run_name, check_status, check_tags

if TYPE_CHECKING:
    from .recorder import Recorder

__all__ = ["EventWriter", "writer_for"]

_BODY_BYTES: Final = MAX_BODY_BYTES - 4 * MAX_RUN_ID_CHARS - 1_000
"""What keys and values of one event may take, with room for its other fields."""
_KNOWN_RUNS: Final = 1_000
"""Runs of this process whose params are remembered, to tell conflicts at the call; the oldest is forgotten first."""


class EventWriter:
    """Events of one tracking address in this process. Thread-safe and fork-safe, as the recorder is."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._lock = threading.Lock()
        self._params: dict[str, dict[str, str]] = {}
        self._created: set[str] = set()

    @property
    def settings(self) -> Settings:
        return self.recorder.settings

    def create_experiment(self, experiment_id: str, name: str, artifact_uri: str = "") -> None:
        """Say that an experiment is in use; the first such event anywhere decides name and artifact URI.

        Args:
            artifact_uri: root of its runs' artifacts, or "" for the store's own root.
        """
        if experiment_id in self._created:
            return
        now = identity.now_ms()
        fields = {"experiment_id": experiment_id, "name": name, "artifact_uri": artifact_uri, "created_at": now}
        self.recorder.control("experiment_created", fields)
        self._created.add(experiment_id)

    def update_experiment(
        self, experiment_id: str, *, name: str = "", lifecycle_stage: str = "", after: Version | None = None
    ) -> None:
        """Rename, delete (`lifecycle_stage="deleted"`) or restore (`"active"`) an experiment.

        Args:
            after: the state that was read; the new one gets a newer version.
        """
        fields = {"experiment_id": experiment_id, "name": name, "lifecycle_stage": lifecycle_stage}
        self.recorder.control("experiment_updated", {**fields, **self._version_after(after)})

    def tag_experiment(self, experiment_id: str, tags: object, deleted: tuple[str, ...] = ()) -> None:
        """Set and delete tags of an experiment."""
        self._keyed("experiment_tags", {"experiment_id": experiment_id}, check_experiment_tags(tags), deleted)

    def start_run(self, info: RunInfo, stored_artifact_uri: str) -> None:
        """Say that a run has started; the first such event of a run decides.

        Args:
            stored_artifact_uri: see `addresses.stored_artifact_uri`.
        """
        self.recorder.control(
            "run_started",
            {
                "run_id": info.run_id,
                "experiment_id": info.experiment_id,
                "name": info.run_name,
                "user": info.user_id,
                "source_name": info.source_name,
                "source_type": info.source_type,
                "source_version": info.source_version,
                "artifact_uri": stored_artifact_uri,
                "parent_run_id": info.parent_run_id or "",
                "started_at": info.start_time,
            },
        )

    def update_run(
        self,
        run_id: str,
        *,
        status: str = "",
        ended_at: int | None = None,
        name: str = "",
        lifecycle_stage: str = "",
        after: Version | None = None,
    ) -> None:
        """Change state of a run; what is left out stays.

        Args:
            after: the state that was read; the new one gets a newer version.
        """
        fields = {
            "run_id": run_id,
            "status": check_status(status) if status else "",
            "ended_at": -1 if ended_at is None else ended_at,
            "name": check_run_name(name) if name else "",
            "lifecycle_stage": lifecycle_stage,
        }
        self.recorder.control("run_updated", {**fields, **self._version_after(after)})

    def log_params(self, run_id: str, params: object) -> dict[str, str]:
        """Log params; all or none. The stored values.

        Raises:
            InvalidInputError: a key or value does not fit, or this process knows another value of a key.
        """
        checked = check_params(params)
        with self._lock:
            known = self._params.get(run_id, {})
            fresh: dict[str, str] = {}
            for key, value in checked.items():
                before = known.get(key)
                if before is None:
                    fresh[key] = value
                elif before != value:
                    raise InvalidInputError(
                        f"param {key!r} of run {run_id} is {before[:200]!r} and cannot become {value[:200]!r}: params "
                        "are set once; log it under another key, or use set_tag for what changes"
                    )
            self._know_params(run_id, fresh)
        self._keyed("params", {"run_id": run_id}, fresh, None)
        return checked

    def know_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Remember params that have been read, so that a conflict is an error at the call."""
        with self._lock:
            self._know_params(run_id, params)

    def known_params(self, run_id: str) -> dict[str, str]:
        """Params of a run as far as this process knows them."""
        with self._lock:
            return dict(self._params.get(run_id, {}))

    def set_tags(self, run_id: str, tags: object) -> dict[str, str]:
        """Set tags of a run; the stored values."""
        checked = check_tags(tags)
        self._keyed("run_tags", {"run_id": run_id}, checked, ())
        return checked

    def delete_tag(self, run_id: str, key: object) -> None:
        """Delete one tag of a run; a missing one is no error."""
        self._keyed("run_tags", {"run_id": run_id}, {}, (check_key("tag key", key),))

    def log_artifact(self, run_id: str, path: str, size_bytes: int, digest: str, *, deleted: bool = False) -> None:
        """Say that an artifact lies whole at its place (or was removed)."""
        fields = {"run_id": run_id, "path": path, "size_bytes": size_bytes, "digest": digest, "deleted": deleted}
        self.recorder.control("artifact_logged", fields)

    def log_input(self, run_id: str, dataset: Dataset, context: str, tags: Mapping[str, str]) -> None:
        """Say that a run used a data set."""
        fields: dict[str, Any] = {
            "run_id": run_id,
            "name": dataset.name,
            "digest": dataset.digest,
            "source_type": dataset.source_type,
            "source": dataset.source,
            "schema": dataset.schema or "",
            "profile": dataset.profile or "",
            "context": context,
            "tags": dict(tags),
        }
        size = _size(*(str(value) for value in fields.values()))
        if size > _BODY_BYTES:
            raise InvalidInputError(
                f"data set {dataset.name!r} is described in {size:,} bytes; the limit is {_BODY_BYTES:,}: "
                "shorten source, schema or profile, or log them with log_dict"
            )
        self.recorder.control("input_logged", fields)

    def purge(self, kind: str, identifier: str) -> None:
        """Remove a run or an experiment for ever; cannot be undone."""
        self.recorder.control("purged", {"kind": kind, "id": identifier})

    def _version_after(self, read: Version | None) -> dict[str, int]:
        if read is None:
            return {}
        mine = self.recorder.next_version()
        return identity.version_after(read, mine.seq, mine.writer)._asdict()

    def _know_params(self, run_id: str, params: Mapping[str, str]) -> None:
        self._params.setdefault(run_id, {}).update(params)
        while len(self._params) > _KNOWN_RUNS:
            del self._params[next(iter(self._params))]

    def _keyed(
        self, event: EventName, owner: Mapping[str, Any], values: Mapping[str, str], deleted: tuple[str, ...] | None
    ) -> None:
        if not values and not deleted:
            return
        fields: dict[str, Any] = {**owner, "keys": list(values), "values": list(values.values())}
        if deleted is not None:
            fields["deleted_keys"] = list(deleted)
        self.recorder.control(event, fields)


def _size(*texts: str) -> int:
    return sum(len(text.encode("utf-8", "replace")) + 10 for text in texts)


def _after_fork() -> None:
    global _writers_lock
    _writers_lock = threading.Lock()  # another thread of the parent may have held it
    for writer in _writers.values():
        writer._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
_writers: dict[str, EventWriter] = {}
_writers_lock = threading.Lock()


def writer_for(settings: Settings) -> EventWriter:
    """The writer of `settings.tracking_uri` in this process, made at the first call."""
    from .recorder import for_target  # journal and delivery: not before something is logged

    recorder = for_target(settings)
    with _writers_lock:
        writer = _writers.get(settings.tracking_uri)
        if writer is None or writer.recorder is not recorder:
            writer = _writers[settings.tracking_uri] = EventWriter(recorder)
        return writer
