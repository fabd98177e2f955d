"""`Client`: the same operations with explicit ids, checked against what lies in the log."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import runstream
from runstream import Client, DatasetInput, InputTag, Metric, Param, RunTag
from runstream.active import tracker
from runstream.testing import Recording, recording


@pytest.fixture
def recorded() -> Iterator[Recording]:
    with recording() as recorded:
        yield recorded


def test_a_run_from_start_to_end(recorded: Recording) -> None:
    """Created, logged to, ended, without any active run."""
    client = Client()
    run = client.create_run("0", start_time=1_700_000_000_000, tags={"a": 1}, run_name="by hand")
    identifier = run.info.run_id
    assert (run.info.status, run.info.run_name, run.data.tags["a"]) == ("RUNNING", "by hand", "1")
    assert identifier in tracker.writer().recorder.open_runs
    client.log_metric(identifier, "loss", 0.5, 1_700_000_000_001, 3)
    assert client.log_param(identifier, "lr", 0.1) == 0.1
    client.set_tag(identifier, "b", 2)
    client.set_tag(identifier, "gone", 1)
    client.delete_tag(identifier, "gone")
    client.log_batch(
        identifier,
        metrics=[Metric("loss", 0.25, 1_700_000_000_002, 4), Metric("acc", 1, 5)],  # type: ignore[arg-type]
        params=[Param("depth", "3"), Param("lr", "0.1")],
        tags=[RunTag("c", "3")],
    )
    client.log_inputs(
        identifier, [DatasetInput(runstream.data.describe("wine"), [InputTag("mlflow.data.context", "t")])]
    )
    client.update_run(identifier, name="renamed")
    client.set_terminated(identifier, "FAILED", 1_700_000_009_000)
    assert runstream.active_run() is None
    assert identifier not in tracker.writer().recorder.open_runs
    found = recorded.run(identifier)
    assert (found.info.status, found.info.start_time, found.info.end_time) == (
        "FAILED",
        1_700_000_000_000,
        1_700_000_009_000,
    )
    assert found.info.run_name == "renamed"
    assert found.data.metrics == {"loss": 0.25, "acc": 1.0}
    assert found.data.params == {"lr": "0.1", "depth": "3"}
    assert {key: found.data.tags[key] for key in ("a", "b", "c", "mlflow.runName")} == {
        "a": "1",
        "b": "2",
        "c": "3",
        "mlflow.runName": "renamed",
    }
    assert "gone" not in found.data.tags
    assert [each.dataset.name for each in found.inputs.dataset_inputs] == ["wine"]
    assert [(point.step, point.timestamp) for point in recorded.metric(identifier, "loss")] == [
        (3, 1_700_000_000_001),
        (4, 1_700_000_000_002),
    ]


def test_terminating_means_finished_now(recorded: Recording) -> None:
    """Without arguments a run is FINISHED, and ends now."""
    client = Client()
    run = client.create_run("0")
    client.set_terminated(run.info.run_id)
    found = recorded.run(run.info.run_id)
    assert found.info.status == "FINISHED"
    assert (found.info.end_time or 0) >= run.info.start_time


def test_an_update_ends_a_run_too(recorded: Recording) -> None:
    """update_run with a final status gives it an end time."""
    client = Client()
    run = client.create_run("0")
    client.update_run(run.info.run_id, "KILLED")
    assert recorded.run(run.info.run_id).info.end_time is not None


def test_nothing_of_a_bad_batch_is_written(recorded: Recording) -> None:
    """Params and tags are checked before the first metric is logged."""
    client = Client()
    run = client.create_run("0")
    with pytest.raises(runstream.InvalidInputError):
        client.log_batch(run.info.run_id, [Metric("m", 1.0, 0)], [Param("p", "v")], [RunTag("", "v")])
    found = recorded.run(run.info.run_id)
    assert found.data.metrics == {}
    assert found.data.params == {}


def test_param_conflicts_are_known_per_run(recorded: Recording) -> None:
    """Another value of a key is an error in the same run and fine in another."""
    client = Client()
    one, two = client.create_run("0"), client.create_run("0")
    client.log_param(one.info.run_id, "lr", 1)
    client.log_param(two.info.run_id, "lr", 2)
    with pytest.raises(runstream.InvalidInputError, match="'lr'"):
        client.log_batch(one.info.run_id, params=[Param("lr", "2")])


def test_two_clients_of_one_address_know_the_same(recorded: Recording) -> None:
    """The fluent API and every Client share what this process knows."""
    with runstream.start_run() as run:
        runstream.log_param("lr", 1)
        with pytest.raises(runstream.InvalidInputError, match="'lr'"):
            Client().log_param(run.info.run_id, "lr", 2)


def test_clients_of_two_addresses_are_apart(tmp_path: Path, recorded: Recording) -> None:
    """A client with its own address leaves the active one alone."""
    other = Client(tmp_path / "other")
    assert other.tracking_uri == (tmp_path / "other").as_uri()
    run = other.create_run("0")
    other.set_terminated(run.info.run_id)
    assert other.flush().complete
    assert recorded.runs == []
    with runstream.start_run() as here:
        other.log_metric(here.info.run_id, "x", 1.0)
    assert recorded.run(here.info.run_id).data.metrics == {}


def test_artifacts_by_run_id(recorded: Recording, tmp_path: Path) -> None:
    """Every artifact call, on a run that is not active."""
    client = Client()
    run_id = client.create_run("0").info.run_id
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "b.txt").write_text("b")
    client.log_text(run_id, "text", "a.txt")
    client.log_dict(run_id, {"k": 1}, "conf/d.yaml")
    client.log_artifact(run_id, tmp_path / "tree" / "sub" / "b.txt", "files")
    client.log_artifacts(run_id, tmp_path / "tree", "tree")
    client.log_table(run_id, {"a": [1]}, "t.json")
    assert [info.path for info in client.list_artifacts(run_id)] == ["a.txt", "conf", "files", "t.json", "tree"]
    assert [info.path for info in client.list_artifacts(run_id, "tree")] == ["tree/sub"]
    local = client.download_artifacts(run_id, "tree", tmp_path / "down")
    assert Path(local, "sub", "b.txt").read_text() == "b"
    events = {fields["path"] for name, fields in recorded.events if name == "artifact_logged"}
    assert events == {"a.txt", "conf/d.yaml", "files/b.txt", "tree/sub/b.txt", "t.json"}


def test_many_threads_log_through_one_client(recorded: Recording) -> None:
    """A client is safe to share."""
    client = Client()
    runs = [client.create_run("0").info.run_id for _ in range(4)]

    def work(run_id: str) -> None:
        for step in range(100):
            client.log_metric(run_id, "x", float(step), step=step)
            client.set_tag(run_id, f"t{step % 5}", step)

    threads = [threading.Thread(target=work, args=(run_id,)) for run_id in runs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run_id in runs:
        assert len(recorded.metric(run_id, "x")) == 200
        assert recorded.run(run_id).data.tags["t4"] == "99"


MLFLOW_ORDER = {
    "create_experiment": "name artifact_location tags",
    "search_experiments": "view_type max_results filter_string order_by page_token",
    "rename_experiment": "experiment_id new_name",
    "set_experiment_tag": "experiment_id key value",
    "create_run": "experiment_id start_time tags run_name",
    "search_runs": "experiment_ids filter_string run_view_type max_results order_by page_token",
    "update_run": "run_id status name",
    "set_terminated": "run_id status end_time",
    "log_metric": "run_id key value timestamp step synchronous",
    "log_param": "run_id key value synchronous",
    "set_tag": "run_id key value synchronous",
    "log_batch": "run_id metrics params tags synchronous",
    "log_inputs": "run_id datasets",
    "get_metric_history": "run_id key",
    "log_artifact": "run_id local_path artifact_path",
    "log_artifacts": "run_id local_dir artifact_path",
    "log_text": "run_id text artifact_file",
    "log_dict": "run_id dictionary artifact_file",
    "log_figure": "run_id figure artifact_file save_kwargs",
    "log_image": "run_id image artifact_file key step timestamp synchronous",
    "log_table": "run_id data artifact_file",
    "list_artifacts": "run_id path",
    "download_artifacts": "run_id path dst_path",
    "get_parent_run": "run_id",
}


@pytest.mark.parametrize("name", MLFLOW_ORDER)
def test_arguments_stand_in_mlflows_order(name: str) -> None:
    """Positional calls written for MLflow's client mean the same here."""
    ours = list(inspect.signature(getattr(Client, name)).parameters)[1:]
    theirs = MLFLOW_ORDER[name].split()
    assert ours[: len(theirs)] == theirs
