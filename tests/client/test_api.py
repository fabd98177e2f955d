"""The fluent API: what each call leaves in the log, with MLflow's names and semantics."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runstream
from runstream.active import tracker
from runstream.testing import Recording, recording
from runstream_schemas import identity


@pytest.fixture
def recorded() -> Iterator[Recording]:
    tracker._target = None
    with recording() as recorded:
        yield recorded
    tracker._target = None


def test_metrics_params_and_tags_reach_the_log(recorded: Recording) -> None:
    """One run with everything that a training loop logs."""
    with runstream.start_run(run_name="first", tags={"env": "prod"}, description="a *note*") as run:
        runstream.log_metric("loss", 0.5, step=1)
        runstream.log_metric("loss", 0.25, 2, timestamp=1_700_000_000_000)
        runstream.log_metrics({"acc": 0.9, "f1": 1}, step=2)
        runstream.log_metric("plain", 3)
        assert runstream.log_param("lr", 0.1) == 0.1
        runstream.log_params({"batch": 32, "path": Path("a/b"), "none": None})
        runstream.set_tag("stage", 1)
        runstream.set_tags({"a": True, "gone": "x"})
        runstream.delete_tag("gone")
        runstream.delete_tag("never")
    (found,) = recorded.runs
    assert found.info.run_id == run.info.run_id
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.info.end_time is not None
    assert found.data.metrics == {"loss": 0.25, "acc": 0.9, "f1": 1.0, "plain": 3.0}
    assert found.data.params == {"lr": "0.1", "batch": "32", "path": "a/b", "none": "None"}
    tags = found.data.tags
    assert {key: tags[key] for key in ("env", "stage", "a", "mlflow.note.content", "mlflow.runName")} == {
        "env": "prod",
        "stage": "1",
        "a": "True",
        "mlflow.note.content": "a *note*",
        "mlflow.runName": "first",
    }
    assert "gone" not in tags
    assert tags["mlflow.source.type"] == "LOCAL"
    points = recorded.metric(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 0.5), (2, 0.25)]
    assert points[1].timestamp == 1_700_000_000_000
    assert recorded.metric(run.info.run_id, "plain")[0].step == 0


@pytest.mark.parametrize("value", [1, True, 0.5, Decimal("0.5"), np.float32(0.5), np.int64(3), np.array(2.0)], ids=repr)
def test_numbers_of_every_kind_are_metric_values(recorded: Recording, value: Any) -> None:
    """Python, numpy and decimal numbers are stored as floats."""
    with runstream.start_run() as run:
        runstream.log_metric("x", value)
        runstream.log_metrics({"x": value}, step=1)
    assert [point.value for point in recorded.metric(run.info.run_id, "x")] == [float(value)] * 2


def test_nan_and_infinities_are_kept(recorded: Recording) -> None:
    """Nothing is clamped on the way."""
    with runstream.start_run() as run:
        for value in (math.nan, math.inf, -math.inf):
            runstream.log_metric("x", value)
    found = [point.value for point in recorded.metric(run.info.run_id, "x")]
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, -math.inf]


def test_logging_without_a_run_starts_one(recorded: Recording) -> None:
    """As in MLflow: the first call opens a run, and end_run ends it."""
    runstream.log_metric("x", 1.0)
    run = runstream.active_run()
    assert run is not None
    runstream.log_param("a", 1)
    runstream.end_run()
    assert runstream.active_run() is None
    runstream.end_run()
    assert [found.info.run_id for found in recorded.runs] == [run.info.run_id]


def test_other_runs_can_be_named(recorded: Recording) -> None:
    """run_id= logs to a run that is not the active one."""
    with runstream.start_run() as outer, runstream.start_run(nested=True) as inner:
        runstream.log_metric("x", 1.0, run_id=outer.info.run_id)
        runstream.log_metrics({"y": 2.0}, run_id=outer.info.run_id)
        runstream.log_params({"p": 1}, run_id=outer.info.run_id)
        runstream.log_metric("x", 5.0)
    assert recorded.run(outer.info.run_id).data.metrics == {"x": 1.0, "y": 2.0}
    assert recorded.run(outer.info.run_id).data.params == {"p": "1"}
    assert recorded.run(inner.info.run_id).data.metrics == {"x": 5.0}


def test_params_may_be_repeated_but_not_changed(recorded: Recording) -> None:
    """The same value again is fine; another one names key, both values and the remedy, and logs nothing."""
    with runstream.start_run() as run:
        runstream.log_param("lr", 0.1)
        runstream.log_param("lr", "0.1")
        with pytest.raises(runstream.InvalidInputError, match=r"'lr'.*'0\.1'.*'0\.2'.*set_tag"):
            runstream.log_params({"new": 1, "lr": 0.2})
    assert recorded.run(run.info.run_id).data.params == {"lr": "0.1"}


def test_datasets_are_inputs(recorded: Recording) -> None:
    """A described data set and an array, with context and tags."""
    with runstream.start_run() as run:
        runstream.log_input(
            name="wine", digest="d1", source="sklearn.datasets.load_wine", context="training", schema={"x": "float"}
        )
        runstream.log_input(np.zeros(3), context="validation", tags={"fold": 1}, name="zeros")
        runstream.log_inputs([runstream.data.describe("a"), runstream.data.describe("b")], ["training", None])
    inputs = recorded.run(run.info.run_id).inputs.dataset_inputs
    assert [each.dataset.name for each in inputs] == ["wine", "zeros", "a", "b"]
    assert (inputs[0].dataset.digest, inputs[0].dataset.source) == ("d1", "sklearn.datasets.load_wine")
    assert {tag.key: tag.value for tag in inputs[1].tags} == {"mlflow.data.context": "validation", "fold": "1"}
    assert inputs[3].tags == []


def test_experiments_need_no_round_trip(recorded: Recording) -> None:
    """set_experiment computes the id, says once that it is in use, and later runs belong to it."""
    found = runstream.set_experiment("vision")
    assert found.experiment_id == identity.experiment_id("vision")
    runstream.set_experiment("vision")
    runstream.set_experiment_tag("team", "a")
    runstream.set_experiment_tags({"b": 2})
    runstream.delete_experiment_tag("b")
    with runstream.start_run() as run:
        assert run.info.experiment_id == found.experiment_id
    created = [fields for name, fields in recorded.events if name == "experiment_created"]
    assert [(each["experiment_id"], each["name"]) for each in created] == [(found.experiment_id, "vision")]
    tagged = [fields for name, fields in recorded.events if name == "experiment_tags"]
    assert [(each["keys"], each["deleted_keys"]) for each in tagged] == [(["team"], []), (["b"], []), ([], ["b"])]


def test_the_default_experiment_exists(recorded: Recording) -> None:
    """Without set_experiment a run belongs to Default, id 0."""
    with runstream.start_run() as run:
        assert run.info.experiment_id == "0"
    assert [fields["name"] for name, fields in recorded.events if name == "experiment_created"] == ["Default"]


def test_the_environment_names_the_experiment(recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUNSTREAM_EXPERIMENT_NAME and RUNSTREAM_EXPERIMENT_ID count until set_experiment is called."""
    monkeypatch.setenv("RUNSTREAM_EXPERIMENT_NAME", "of the environment")
    with runstream.start_run() as run:
        assert run.info.experiment_id == identity.experiment_id("of the environment")
    monkeypatch.delenv("RUNSTREAM_EXPERIMENT_NAME")
    monkeypatch.setenv("RUNSTREAM_EXPERIMENT_ID", "12345")
    with runstream.start_run() as run:
        assert run.info.experiment_id == "12345"
    runstream.set_experiment("chosen")
    with runstream.start_run() as run:
        assert run.info.experiment_id == identity.experiment_id("chosen")


def test_artifact_locations_of_experiments(recorded: Recording, tmp_path: Path) -> None:
    """An experiment made with its own location keeps its runs' artifacts there."""
    made = runstream.create_experiment("located", artifact_location=str(tmp_path / "here"), tags={"a": 1})
    runstream.set_experiment("located")
    with runstream.start_run() as run:
        runstream.log_text("x", "a.txt")
        root = (tmp_path / "here").as_uri()
        assert runstream.get_artifact_uri("a.txt") == f"{root}/{run.info.run_id}/artifacts/a.txt"
    assert (tmp_path / "here" / run.info.run_id / "artifacts" / "a.txt").read_text() == "x"
    (created,) = [fields for name, fields in recorded.events if name == "experiment_created"]
    assert (created["experiment_id"], created["artifact_uri"]) == (made, (tmp_path / "here").as_uri())


def test_lifecycle_calls_are_events(recorded: Recording) -> None:
    """Delete, restore and rename append facts; nothing is read where there is nothing to read from."""
    with runstream.start_run() as run:
        pass
    runstream.delete_run(run.info.run_id)
    assert recorded.run(run.info.run_id).info.lifecycle_stage == "deleted"
    runstream.restore_run(run.info.run_id)
    assert recorded.run(run.info.run_id).info.lifecycle_stage == "active"
    runstream.rename_experiment("77", "new name")
    runstream.delete_experiment("77")
    runstream.restore_experiment("77")
    updates = [fields for name, fields in recorded.events if name == "experiment_updated"]
    assert [(each["name"], each["lifecycle_stage"]) for each in updates] == [
        ("new name", ""),
        ("", "deleted"),
        ("", "active"),
    ]


def test_default_cannot_be_deleted_renamed_or_made(recorded: Recording) -> None:
    """The experiment that every run can fall back to stays."""
    for call in (
        lambda: runstream.delete_experiment("0"),
        lambda: runstream.rename_experiment("0", "x"),
        lambda: runstream.create_experiment("Default"),
    ):
        with pytest.raises(runstream.InvalidInputError, match="Default"):
            call()


def test_tracking_uri_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path becomes a URL; None goes back to the environment; a wrong one changes nothing."""
    monkeypatch.delenv("RUNSTREAM_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert not runstream.is_tracking_uri_set()
    assert runstream.get_tracking_uri() == (tmp_path / "runstream-data").as_uri()
    try:
        runstream.set_tracking_uri(tmp_path / "x")
        assert runstream.get_tracking_uri() == (tmp_path / "x").as_uri()
        assert runstream.is_tracking_uri_set()
        with pytest.raises(runstream.SettingsError, match="ftp"):
            runstream.set_tracking_uri("ftp://host/x")
        assert runstream.get_tracking_uri() == (tmp_path / "x").as_uri()
    finally:
        runstream.set_tracking_uri(None)
    monkeypatch.setenv("RUNSTREAM_TRACKING_URI", "memory://env")
    assert runstream.get_tracking_uri() == "memory://env"


def test_flush_reports(recorded: Recording) -> None:
    """A flush is true once everything is in the log, and says what is not."""
    with runstream.start_run():
        runstream.log_metric("x", 1.0)
        assert runstream.flush().complete
        recorded.transport.away = "the broker is away"
        runstream.log_metric("x", 2.0)
        report = runstream.flush(0.2)
        assert not report.complete
        recorded.transport.away = None
        assert runstream.flush().complete


def test_an_absent_log_never_raises(recorded: Recording) -> None:
    """Every logging call works while the log is away, and everything arrives when it is back."""
    recorded.transport.away = "the broker is away"
    with runstream.start_run() as run:
        runstream.log_metric("x", 1.0)
        runstream.log_param("p", 1)
        runstream.set_tag("t", 1)
    recorded.transport.away = None
    found = recorded.run(run.info.run_id)
    assert (found.info.status, found.data.metrics, found.data.params) == ("FINISHED", {"x": 1.0}, {"p": "1"})


MLFLOW_ORDER = {
    "start_run": "run_id experiment_id run_name nested parent_run_id tags description log_system_metrics",
    "end_run": "status",
    "log_metric": "key value step synchronous timestamp run_id model_id dataset",
    "log_metrics": "metrics step synchronous run_id timestamp model_id dataset",
    "log_param": "key value synchronous",
    "log_params": "params synchronous run_id",
    "set_tag": "key value synchronous",
    "set_tags": "tags synchronous",
    "delete_tag": "key",
    "log_input": "dataset context tags model",
    "log_artifact": "local_path artifact_path run_id",
    "log_artifacts": "local_dir artifact_path run_id",
    "log_text": "text artifact_file run_id",
    "log_dict": "dictionary artifact_file run_id",
    "log_figure": "figure artifact_file save_kwargs",
    "log_image": "image artifact_file key step timestamp synchronous",
    "log_table": "data artifact_file run_id",
    "load_table": "artifact_file run_ids extra_columns",
    "get_artifact_uri": "artifact_path",
    "set_experiment": "experiment_name experiment_id",
    "create_experiment": "name artifact_location tags",
    "search_runs": "experiment_ids filter_string run_view_type max_results order_by output_format "
    "search_all_experiments experiment_names",
    "search_experiments": "view_type max_results filter_string order_by",
    "set_experiment_tag": "key value",
    "delete_run": "run_id",
    "get_run": "run_id",
}


@pytest.mark.parametrize("name", MLFLOW_ORDER)
def test_arguments_stand_in_mlflows_order(name: str) -> None:
    """Positional calls written for MLflow mean the same here."""
    ours = list(inspect.signature(getattr(runstream, name)).parameters)
    theirs = MLFLOW_ORDER[name].split()
    assert ours[: len(theirs)] == theirs
