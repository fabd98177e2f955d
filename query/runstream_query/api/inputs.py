"""Data sets that runs read: log-inputs and search-datasets."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from runstream_schemas.limits import MAX_BODY_BYTES

from .backend import Backend
from .errors import invalid
from .routing import Endpoint
from .run_rows import input_names
from .validation import (
    MAX_DATASET_DIGEST_CHARS,
    MAX_DATASET_NAME_CHARS,
    MAX_DATASET_PROFILE_CHARS,
    MAX_DATASET_SCHEMA_CHARS,
    MAX_DATASET_SOURCE_CHARS,
    MAX_INPUT_TAG_KEY_CHARS,
    MAX_INPUT_TAG_VALUE_CHARS,
    check_experiment_id,
    check_length,
    check_run_id,
)
from .wire import JsonResponse, KeyValue, Message, missing_value, read

MAX_DATASET_SUMMARIES: Final = 1_000
MAX_SEARCH_EXPERIMENTS: Final = 20
CONTEXT_TAG: Final = "mlflow.data.context"


class Dataset(Message):
    """A data set"""

    name: str | None = None
    digest: str | None = None
    source_type: str | None = None
    source: str | None = None
    dataset_schema: str | None = Field(default=None, validation_alias="schema")
    profile: str | None = None


class DatasetInput(Message):
    """A data set's use by a run"""

    tags: list[KeyValue] | None = None
    dataset: Dataset | None = None


class SearchDatasets(Message):
    """experiments/search-datasets"""

    experiment_ids: list[str] | None = None


def check_input(entry: DatasetInput, index: int) -> tuple[Dataset, dict[str, str]]:
    """The data set and tags of one input.

    Raises:
        ApiError: something is missing or above MLflow's limits.
    """
    dataset = entry.dataset
    if dataset is None:
        raise invalid("Dataset cannot be None")
    for name in ("name", "digest", "source_type", "source"):
        if not getattr(dataset, name):
            raise missing_value(f"datasets[{index}].dataset.{name}")
    check_length("name", MAX_DATASET_NAME_CHARS, dataset.name or "")
    check_length("digest", MAX_DATASET_DIGEST_CHARS, dataset.digest or "")
    check_length("source", MAX_DATASET_SOURCE_CHARS, dataset.source or "")
    check_length("schema", MAX_DATASET_SCHEMA_CHARS, dataset.dataset_schema or "")
    check_length("profile", MAX_DATASET_PROFILE_CHARS, dataset.profile or "")
    tags: dict[str, str] = {}
    for position, tag in enumerate(entry.tags or ()):
        if not tag.key:
            raise missing_value(f"datasets[{index}].tags[{position}].key")
        check_length("key", MAX_INPUT_TAG_KEY_CHARS, tag.key)
        check_length("value", MAX_INPUT_TAG_VALUE_CHARS, tag.value or "")
        tags[tag.key] = tag.value or ""
    return dataset, tags


async def _search_datasets(backend: Backend, request: Request) -> Response:
    message = await read(SearchDatasets, request)
    ids = message.experiment_ids or []
    if not ids:
        raise invalid("SearchDatasets request must specify at least one experiment_id.")
    if len(ids) > MAX_SEARCH_EXPERIMENTS:
        raise invalid(
            f"SearchDatasets request cannot specify more than {MAX_SEARCH_EXPERIMENTS} experiment_ids."
            f" Received {len(ids)} experiment_ids."
        )
    sql = f"""SELECT DISTINCT r.experiment_id, i.name, i.digest, i.context FROM inputs AS i
        INNER JOIN (SELECT run_id, experiment_id FROM runs WHERE experiment_id IN {{ids:Array(String)}}) AS r
        ON r.run_id = i.run_id ORDER BY 1, 2, 3, 4 LIMIT {MAX_DATASET_SUMMARIES}"""
    rows = await backend.rows(sql, {"ids": [check_experiment_id(identity) for identity in ids]})
    summaries: list[dict[str, Any]] = []
    for experiment_id, name, digest, context in rows:
        summary = {"experiment_id": experiment_id, "name": name, "digest": digest}
        if context:
            summary["context"] = context
        summaries.append(summary)
    return JsonResponse({"dataset_summaries": summaries} if summaries else {})


async def log_datasets(backend: Backend, run_id: str, datasets: list[DatasetInput]) -> None:
    """Validate and append the inputs of one run; a data set that the run has already keeps its tags."""
    check_run_id(run_id)
    checked = [check_input(entry, index) for index, entry in enumerate(datasets)]
    state = await backend.active_run(run_id)
    if not checked:
        return
    known = await backend.read(input_names, backend.reading, run_id)
    events = []
    for dataset, tags in checked:
        if (dataset.name, dataset.digest) in known:
            continue
        known.add((dataset.name or "", dataset.digest or ""))
        context = tags.pop(CONTEXT_TAG, "")
        made = backend.events.make(
            "input_logged",
            state.run_id,
            run_id=state.run_id,
            name=dataset.name,
            digest=dataset.digest,
            source_type=dataset.source_type,
            source=dataset.source,
            schema=dataset.dataset_schema or "",
            profile=dataset.profile or "",
            context=context,
            tags=tags,
        )
        if len(made.body) > MAX_BODY_BYTES:
            raise invalid(
                f"Data set '{dataset.name}' takes {len(made.body)} bytes; one may take {MAX_BODY_BYTES}:"
                " log a smaller schema or profile."
            )
        events.append(made)
    if events:
        await backend.write(*events)


ENDPOINTS = (Endpoint("POST", "/mlflow/experiments/search-datasets", _search_datasets, SearchDatasets),)
