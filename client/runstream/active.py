"""What is active in this process: tracking address, experiment, and the stack of open runs.

Process-global, so that new threads see the active run; a lock guards changes, and the hot path reads nothing here.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from runstream_schemas import identity

from . import hot
from .addresses import full_artifact_uri, location_uri, stored_artifact_uri
from .config import Settings
from .entities import Run, RunInfo, RunStatus
from .errors import InvalidInputError
from .events import EventWriter, writer_for
from .process_end import ProcessEnd
from .run import ActiveRun
from .run_name import name_for
from .source import BackgroundCapture, capture
from .validation import check_experiment_id, check_experiment_name, check_run_id, check_run_name, check_tags, check_text

if TYPE_CHECKING:
    from .delivery_report import Report

__all__ = ["Target", "Tracker", "tracker"]

_LOG = logging.getLogger("runstream")
_SYSTEM_METRICS: Final = "RUNSTREAM_ENABLE_SYSTEM_METRICS_LOGGING"
_YES: Final = ("1", "true", "yes", "on")
_MAX_DESCRIPTION_CHARS: Final = 65_536


@dataclass(frozen=True, slots=True)
class Target:
    """An experiment as far as this process knows it."""

    experiment_id: str
    name: str
    """Empty where only the id is known."""
    location: str = ""
    """Its own artifact location, or empty."""


class Tracker:
    """The state behind the module-level functions: there is one, `tracker`. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._uri: str | os.PathLike[str] | None = None
        self.override: Settings | None = None
        """Settings in place of the environment's and of `set_tracking_uri`; for `testing`."""
        self._target: Target | None = None
        self._targets: dict[tuple[str, str], Target] = {}  # by tracking address and experiment id
        self._stack: list[ActiveRun] = []
        self._last: ActiveRun | None = None
        self._environment_run_used = False
        self._deleted: set[str] = set()
        self._background = BackgroundCapture()
        self._ticket = 0
        self._end = ProcessEnd(self.end_all, self._settle, self._deliver)
        self.system_metrics: bool | None = None
        """Whether runs sample system metrics; None: as the environment says."""
        self.system_metrics_changes: dict[str, Any] = {}
        """Fields of `SystemMetricsSettings` that calls have set; they go before the environment's."""

    def set_tracking_uri(self, uri: str | os.PathLike[str] | None) -> None:
        """Where later runs log to; None: back to the environment's address. Open runs stay where they are."""
        if uri is not None:
            Settings.from_environment(tracking_uri=uri)  # raises before anything has changed
        self._uri = uri

    @property
    def is_uri_set(self) -> bool:
        """Whether `set_tracking_uri` is in force."""
        return self._uri is not None

    def change_system_metrics(self, field: str, value: Any) -> None:
        """Change how later runs sample; None: back to the environment's setting or the default.

        Raises:
            InvalidInputError: the value does not fit.
        """
        from .system_metrics import settings_from_environment

        changes = {key: each for key, each in self.system_metrics_changes.items() if key != field}
        if value is not None:
            changes[field] = value
        settings_from_environment(changes)
        self.system_metrics_changes = changes

    def flush(self, timeout_seconds: float) -> Report:
        """Flush the address in force and those of open runs; the first incomplete report, or else the last."""
        writers = {id(run._writer): run._writer for run in self._stack}
        here = self.writer()
        writers[id(here)] = here
        deadline = time.monotonic() + timeout_seconds
        reports = [each.recorder.flush(max(0.0, deadline - time.monotonic())) for each in writers.values()]
        return next((each for each in reports if not each.complete), reports[-1])

    def settings(self) -> Settings:
        """The settings in force."""
        return self.override or Settings.from_environment(tracking_uri=self._uri)

    def writer(self) -> EventWriter:
        """The writer of the tracking address in force."""
        return writer_for(self.settings())

    def writer_of(self, run_id: str) -> EventWriter:
        """The writer of an open run's own address, or of the address in force."""
        for run in self._stack:
            if run.info.run_id == run_id:
                return run._writer
        return self.writer()

    @property
    def active_run(self) -> ActiveRun | None:
        """The newest open run."""
        stack = self._stack
        return stack[-1] if stack else None

    @property
    def last_run(self) -> ActiveRun | None:
        """The active run, or the one that ended last."""
        return self.active_run or self._last

    def open_run(self, run_id: str) -> ActiveRun | None:
        """The open run with this id."""
        return next((run for run in self._stack if run.info.run_id == run_id), None)

    def require_run(self) -> ActiveRun:
        """The active run; one is started where there is none, as MLflow does."""
        return self.active_run or self.start_run()

    def target(self) -> Target:
        """The experiment in force: of `set_experiment`, of the environment, or Default."""
        if self._target is not None:
            return self._target
        name = os.environ.get("RUNSTREAM_EXPERIMENT_NAME")
        if name:
            return self.target_named(name)
        experiment_id = os.environ.get("RUNSTREAM_EXPERIMENT_ID")
        if experiment_id and experiment_id != identity.DEFAULT_EXPERIMENT_ID:
            known = self._targets.get((self.settings().tracking_uri, experiment_id))
            return known or Target(check_experiment_id(experiment_id), "")
        return Target(identity.DEFAULT_EXPERIMENT_ID, identity.DEFAULT_EXPERIMENT_NAME)

    def target_named(self, name: object) -> Target:
        """The experiment called `name`; its id follows from the name, so nothing is read."""
        text = check_experiment_name(name)
        here = self.settings().tracking_uri
        known = next((each for (uri, _), each in self._targets.items() if uri == here and each.name == text), None)
        return known or Target(identity.experiment_id(text), text)

    def target_with_id(self, experiment_id: object, settings: Settings) -> Target:
        """The experiment with this id, looked up where reading is possible."""
        text = check_experiment_id(experiment_id)
        if text == identity.DEFAULT_EXPERIMENT_ID:
            return Target(text, identity.DEFAULT_EXPERIMENT_NAME)
        known = self._targets.get((settings.tracking_uri, text))
        if known is None:
            from .reading import existing

            found = existing(settings, f"experiment {text}", lambda reader: reader.get_experiment(text))
            known = Target(text, found.name if found else "")
            self.know(settings, known)
        return known

    def use(self, settings: Settings, target: Target) -> None:
        """Make `target` the experiment of later runs."""
        self.know(settings, target)
        self._target = target

    def know(self, settings: Settings, target: Target) -> None:
        """Remember an experiment without making it the active one."""
        self._targets = {**self._targets, (settings.tracking_uri, target.experiment_id): target}

    def ensure_created(self, writer: EventWriter, target: Target) -> None:
        """Say once per process that the experiment is in use."""
        if target.name:
            writer.create_experiment(target.experiment_id, target.name, self.stored_location(writer.settings, target))

    def stored_location(self, settings: Settings, target: Target) -> str:
        """What the creation event of an experiment says about its artifacts."""
        if target.location:
            return target.location
        return f"{location_uri(settings.artifact_root)}/{target.experiment_id}" if settings.artifact_root else ""

    def start_run(
        self,
        run_id: str | None = None,
        experiment_id: str | None = None,
        run_name: str | None = None,
        nested: bool = False,
        parent_run_id: str | None = None,
        tags: Mapping[str, Any] | None = None,
        description: str | None = None,
        log_system_metrics: bool | None = None,
    ) -> ActiveRun:
        """Open a run and make it the active one; see `runstream.start_run`."""
        checked = check_tags(tags or {})
        if run_name is not None:
            checked["mlflow.runName"] = check_run_name(run_name)
        if description is not None:
            if "mlflow.note.content" in checked:
                raise InvalidInputError("give the description either as description= or as the tag mlflow.note.content")
            checked["mlflow.note.content"] = check_text("description", description, _MAX_DESCRIPTION_CHARS)
        parent = check_run_id(parent_run_id) if parent_run_id is not None else ""
        settings = self.settings()
        self._refuse_second(nested)
        identifier, is_explicit, owns_status = self._run_id(run_id)
        # Outside of the lock: this may read, and other threads go on ending and starting their runs meanwhile.
        earlier = self._earlier(settings, identifier) if is_explicit and identifier else None
        home = earlier.info.experiment_id if earlier is not None else None
        if None not in (home, experiment_id) and home != check_experiment_id(experiment_id):
            raise InvalidInputError(
                f"run {identifier} belongs to experiment {home}, not {experiment_id}: leave it out to resume the run"
            )
        target = self.target_with_id(experiment_id, settings) if experiment_id is not None else self.target()
        with self._lock:
            above = self._refuse_second(nested)
            if above is not None and not parent:
                parent = above.info.run_id
            run = self._open(settings, target, identifier, earlier, parent, checked, owns_status)
            self._stack.append(run)
            hot.activate(run.channel)
            self._end.watch()
        self._sample(run, log_system_metrics, resumed=earlier is not None)
        return run

    def end_run(self, status: str = "FINISHED") -> None:
        """End the active run; nothing happens where there is none."""
        run = self.active_run
        if run is not None:
            run.end(status)

    def end_all(self, status: str) -> None:
        """End every open run, the newest first."""
        for run in reversed(list(self._stack)):
            run.end(status)

    def note_lifecycle(self, run_id: str, stage: str) -> None:
        """A run has been deleted or restored here: resuming it asks the store."""
        if stage == "deleted":
            self._deleted.add(run_id)
        else:
            self._deleted.discard(run_id)

    def _refuse_second(self, nested: bool) -> ActiveRun | None:
        """The active run, which a new one would be a child of."""
        above = self.active_run
        if above is not None and not nested:
            raise InvalidInputError(
                f"run {above.info.run_id} is already active: end it with runstream.end_run(), or start a nested run "
                "with start_run(nested=True)"
            )
        return above

    def _run_id(self, given: object) -> tuple[str | None, bool, bool]:
        """(run id or None for a new one, whether it was given to the call, whether the status is ours to write)."""
        if given is not None:
            return check_run_id(given), True, True
        inherited = os.environ.get("RUNSTREAM_RUN_ID")
        if inherited and not self._stack and not self._environment_run_used:
            self._environment_run_used = True
            return check_run_id(inherited), False, not _is_helper_rank()
        return None, False, True

    def _earlier(self, settings: Settings, run_id: str) -> Run | None:
        """The run that is resumed, as it stands in the store, if it can be read."""
        last = self._last
        ours = last is not None and last.info.run_id == run_id and run_id not in self._deleted
        if last is not None and ours and last._writer.settings.tracking_uri == settings.tracking_uri:
            return last.to_entity()
        from .reading import existing

        found = existing(settings, f"run {run_id}", lambda reader: reader.get_run(run_id))
        if found is not None and found.info.lifecycle_stage == "deleted":
            raise InvalidInputError(f"run {run_id} is deleted: bring it back with runstream.restore_run({run_id!r})")
        return found

    def _open(
        self,
        settings: Settings,
        target: Target,
        run_id: str | None,
        earlier: Run | None,
        parent: str,
        tags: dict[str, str],
        owns_status: bool,
    ) -> ActiveRun:
        writer, source = writer_for(settings), capture()
        if earlier is not None:
            # The same start again, so that it does not matter which of the two a reader takes for the first.
            info = replace(earlier.info, status=RunStatus.RUNNING.value, end_time=None)
            stored = info.artifact_uri
            relative = f"{info.experiment_id}/{info.run_id}/artifacts"
            if not settings.artifact_root and stored.endswith((f"/artifacts/{relative}", f":/{relative}")):
                stored = relative
            tags = {key: value for key, value in tags.items() if key != "mlflow.runName"}
            writer.know_params(info.run_id, earlier.data.params)
        else:
            identifier = run_id or identity.new_run_id(target.experiment_id)
            stored = stored_artifact_uri(settings, target.experiment_id, identifier, target.location)
            info = RunInfo(
                run_id=identifier,
                experiment_id=target.experiment_id,
                run_name=tags.get("mlflow.runName") or name_for(identifier),
                user_id=source.user,
                status=RunStatus.RUNNING.value,
                start_time=identity.now_ms(),
                end_time=None,
                artifact_uri=full_artifact_uri(settings, stored),
                parent_run_id=parent or None,
                source_name=source.name,
                source_type=source.type,
                source_version=source.version,
            )
            self.ensure_created(writer, target)
            if run_id is None:
                tags = {"mlflow.runName": info.run_name, **source.tags(), **tags}
                if parent:
                    tags["mlflow.parentRunId"] = parent
        writer.start_run(info, stored)
        if owns_status:
            writer.update_run(info.run_id, status=RunStatus.RUNNING.value)
        if tags:
            writer.set_tags(info.run_id, tags)
        writer.recorder.open_run(info.run_id)
        if earlier is None and owns_status:
            self._ticket = self._background.request(
                source.checkout, lambda facts: _ignore(writer.set_tags(info.run_id, facts))
            )
        return ActiveRun(writer, info, tags=tags, owns_status=owns_status, on_end=self._ended, judge=self._end.judge)

    def _ended(self, run: ActiveRun) -> None:
        with self._lock:
            if run in self._stack:
                self._stack.remove(run)
            self._last = run
            above = self.active_run
            hot.activate(above.channel if above is not None else None)
            if above is None:
                self._end.rest()

    def _sample(self, run: ActiveRun, wanted: bool | None, *, resumed: bool) -> None:
        if wanted is None:
            wanted = self.system_metrics
        if wanted is None:
            wanted = os.environ.get(_SYSTEM_METRICS, "").lower() in _YES
        if not wanted:
            return
        from .system_metrics import SystemMetrics, settings_from_environment

        settings = settings_from_environment(self.system_metrics_changes)
        if resumed:
            period = settings.interval_seconds * settings.samples_before_logging
            settings = replace(settings, first_step=int((identity.now_ms() - run.info.start_time) / 1000 / period) + 1)
        run.start_system_metrics(SystemMetrics(lambda points, step: run.log_metrics(points, step), settings))

    def _settle(self, timeout_seconds: float) -> None:
        if self._ticket:
            self._background.wait(self._ticket, timeout_seconds)

    def _deliver(self, timeout_seconds: float) -> None:
        from .process_life import close_all

        close_all(timeout_seconds)

    def after_fork_in_child(self) -> None:
        """In a forked child: the lock is new, for another thread of the parent may have held the old one."""
        self._lock = threading.RLock()
        self._end.after_fork_in_child()

    def before_fork(self) -> None:
        """See `ProcessEnd`."""
        self._end.before_fork()

    def after_fork_in_parent(self) -> None:
        """See `ProcessEnd`."""
        self._end.after_fork_in_parent()


def _is_helper_rank() -> bool:
    """Whether this is one of several processes of a distributed training, and not the first."""
    rank = os.environ.get("RANK", "")
    return rank.isdecimal() and int(rank) > 0


def _ignore(value: object) -> None:
    """For a callback whose result nobody wants."""


tracker = Tracker()
os.register_at_fork(
    before=tracker.before_fork,
    after_in_parent=tracker.after_fork_in_parent,
    after_in_child=tracker.after_fork_in_child,
)
