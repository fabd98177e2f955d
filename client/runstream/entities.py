"""What reading returns: light values with MLflow's names and units. Owns no behaviour beyond small conversions.

Times are UTC milliseconds since 1970 as int. Everything here is frozen and compares by value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Generic, TypeVar

__all__ = [
    "Dataset",
    "DatasetInput",
    "Experiment",
    "ExperimentTag",
    "FileInfo",
    "InputTag",
    "Metric",
    "PagedList",
    "Param",
    "Run",
    "RunData",
    "RunInfo",
    "RunInputs",
    "RunStatus",
    "RunTag",
    "ViewType",
]

T = TypeVar("T")


class ViewType(IntEnum):
    """Which lifecycle stages a search returns."""

    ACTIVE_ONLY = 1
    DELETED_ONLY = 2
    ALL = 3


class RunStatus(StrEnum):
    """Status of a run. Each member is the string that views and events carry."""

    RUNNING = "RUNNING"
    SCHEDULED = "SCHEDULED"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"

    @staticmethod
    def to_string(status: RunStatus | str) -> str:
        """The name of `status`, as MLflow's function of that name."""
        return RunStatus(status).value

    @staticmethod
    def from_string(status: str) -> RunStatus:
        """The member called `status`."""
        return RunStatus(status)

    @staticmethod
    def is_terminated(status: RunStatus | str) -> bool:
        """Whether a run with `status` has ended."""
        return status in (RunStatus.FINISHED, RunStatus.FAILED, RunStatus.KILLED)


class PagedList(list[T], Generic[T]):
    """One page of a search; `token` asks for the next one and is None on the last."""

    def __init__(self, items: Iterable[T] = (), token: str | None = None) -> None:
        super().__init__(items)
        self.token = token


@dataclass(frozen=True, slots=True)
class Metric:
    """One point of a metric."""

    key: str
    value: float
    timestamp: int
    """UTC milliseconds."""
    step: int = 0


@dataclass(frozen=True, slots=True)
class Param:
    """A param: set once."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class RunTag:
    """A tag of a run."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class ExperimentTag:
    """A tag of an experiment."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class InputTag:
    """A tag of a data set's use by one run."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set that a run used. `schema` and `profile` are JSON or None."""

    name: str
    digest: str
    source_type: str
    source: str
    schema: str | None = None
    profile: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetInput:
    """The use of a data set by a run; the tag `mlflow.data.context` says for what."""

    dataset: Dataset
    tags: list[InputTag] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RunInputs:
    """What a run read."""

    dataset_inputs: list[DatasetInput] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Who, when, where and in which state a run is."""

    run_id: str
    experiment_id: str
    run_name: str
    user_id: str
    status: str
    """RUNNING, SCHEDULED, FINISHED, FAILED or KILLED."""
    start_time: int
    end_time: int | None
    """None while the run has not ended."""
    artifact_uri: str
    lifecycle_stage: str = "active"
    """`active` or `deleted`."""
    heartbeat_time: int | None = None
    """When the run's process was last heard of; None where that is not known."""
    lost: bool = False
    """RUNNING, but silent for longer than `limits.LOST_AFTER_SECONDS`: its process is most likely gone."""
    parent_run_id: str | None = None
    source_name: str = ""
    source_type: str = ""
    source_version: str = ""

    @property
    def run_uuid(self) -> str:
        """MLflow's former name of `run_id`."""
        return self.run_id


@dataclass(frozen=True, slots=True)
class RunData:
    """Latest metrics, params and tags of a run."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def to_dictionary(self) -> dict[str, Any]:
        """Plain dicts, for JSON."""
        return {"metrics": dict(self.metrics), "params": dict(self.params), "tags": dict(self.tags)}


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it was when it was read."""

    info: RunInfo
    data: RunData = field(default_factory=RunData)
    inputs: RunInputs = field(default_factory=RunInputs)


@dataclass(frozen=True, slots=True)
class Experiment:
    """A named group of runs."""

    experiment_id: str
    name: str
    artifact_location: str
    lifecycle_stage: str = "active"
    """`active` or `deleted`."""
    tags: Mapping[str, str] = field(default_factory=dict)
    creation_time: int | None = None
    last_update_time: int | None = None


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One entry of an artifact listing."""

    path: str
    """Relative to the run's artifact URI, with / between parts."""
    is_dir: bool
    file_size: int | None
    """Bytes; None for a folder."""
