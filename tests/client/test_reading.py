"""The door to reading, against a real local store: everything a notebook does with what it has just logged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import runstream
from runstream import Client, ViewType
from runstream.active import tracker
from runstream.reading import close_readers, runs_frame
from runstream_schemas.layout import DataDirectory, ServerAddress

pytest.importorskip("chdb", reason="the local store needs chdb")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data directory that is the tracking address; its store process ends with the tests."""
    folder = tmp_path_factory.mktemp("data")
    runstream.set_tracking_uri(folder)
    yield folder
    close_readers()
    tracker.writer().recorder.close(10.0)
    runstream.set_tracking_uri(None)
    tracker._target = None
    address = ServerAddress.read(DataDirectory(folder).server_file)
    if address is not None:
        os.kill(address.pid, signal.SIGTERM)


def test_what_was_logged_is_found_at_once(data: Path) -> None:
    """Search, run, history and SQL see everything that was logged before, without a flush."""
    runstream.set_experiment("reading")
    with runstream.start_run(run_name="one", tags={"env": "prod"}) as run:
        for step in range(100):
            runstream.log_metric("loss", 1 / (step + 1), step)
        runstream.log_param("lr", 0.1)
        runstream.log_input(name="wine", digest="d", context="training")
        assert [found.info.status for found in runstream.search_runs(output_format="list")] == ["RUNNING"]
    frame = runstream.search_runs(filter_string="metrics.loss < 0.02 and tags.env = 'prod'")
    assert frame["run_id"].tolist() == [run.info.run_id]
    assert frame["params.lr"].tolist() == ["0.1"]
    assert str(frame["start_time"].dtype).startswith("datetime64")
    found = runstream.get_run(run.info.run_id)
    assert (found.info.status, found.info.run_name, found.data.metrics["loss"]) == ("FINISHED", "one", 0.01)
    assert [each.dataset.name for each in found.inputs.dataset_inputs] == ["wine"]
    assert found.info.artifact_uri == run.info.artifact_uri
    assert [point.step for point in runstream.metric_history(run.info.run_id, "loss")] == list(range(100))
    table = runstream.metric_history(run.info.run_id, "loss", output_format="pandas")
    assert table["value"].iloc[-1] == 0.01
    assert runstream.metric_history(run.info.run_id, "never logged") == []
    with pytest.raises(runstream.NotFoundError):
        runstream.metric_history("loss", run.info.run_id)
    rows = runstream.sql(
        "SELECT count() AS n FROM metrics WHERE run_id = {run:String}", {"run": run.info.run_id}, "rows"
    )
    assert rows == [{"n": 100}]


def test_wrong_run_ids_are_errors(data: Path) -> None:
    """Resuming, deleting and reading what is not there raises NotFoundError, and no run is opened."""
    for call in (
        lambda: runstream.start_run(run_id="no-such-run"),
        lambda: runstream.delete_run("no-such-run"),
        lambda: runstream.get_run("no-such-run"),
        lambda: runstream.get_experiment("12"),
        lambda: runstream.set_experiment(experiment_id="12"),
        lambda: Client().update_run("no-such-run", name="x"),
    ):
        with pytest.raises(runstream.NotFoundError):
            call()
    assert runstream.active_run() is None


def test_deleted_runs_are_hidden_and_cannot_be_resumed(data: Path) -> None:
    """Until they are restored."""
    runstream.set_experiment("deleting")
    with runstream.start_run() as run:
        pass
    runstream.delete_run(run.info.run_id)
    assert runstream.search_runs(output_format="list") == []
    assert len(runstream.search_runs(run_view_type=ViewType.DELETED_ONLY, output_format="list")) == 1
    with pytest.raises(runstream.InvalidInputError, match="restore_run"):
        runstream.start_run(run_id=run.info.run_id)
    runstream.restore_run(run.info.run_id)
    with runstream.start_run(run_id=run.info.run_id):
        pass
    assert len(runstream.search_runs(output_format="list")) == 1


def test_a_run_of_another_process_is_resumed_whole(data: Path) -> None:
    """Name, start, experiment, artifacts and params are those of the run, wherever it is resumed."""
    runstream.set_experiment("resuming")
    with runstream.start_run(run_name="shared") as run:
        runstream.log_param("lr", 1)
        runstream.log_text("x", "first.txt")
    code = (
        "import sys, runstream\n"
        "runstream.set_tracking_uri(sys.argv[1])\n"
        "with runstream.start_run(run_id=sys.argv[2]) as run:\n"
        "    assert run.info.run_name == 'shared', run.info\n"
        "    runstream.log_text('y', 'second.txt')\n"
        "    try: runstream.log_param('lr', 2)\n"
        "    except runstream.InvalidInputError: pass\n"
        "    else: raise SystemExit('conflict not seen')\n"
    )
    command = [sys.executable, "-c", code, str(data), run.info.run_id]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = runstream.get_run(run.info.run_id)
    assert found.info.start_time == run.info.start_time
    assert found.info.experiment_id == run.info.experiment_id
    assert [info.path for info in runstream.list_artifacts(run_id=run.info.run_id)] == ["first.txt", "second.txt"]


def test_experiments_from_birth_to_restoration(data: Path) -> None:
    """Created once, found by name and id, renamed, deleted, restored; a freed name can be taken again."""
    made = runstream.create_experiment("life", tags={"team": "a"})
    with pytest.raises(runstream.InvalidInputError, match=f"exists already.*{made}"):
        runstream.create_experiment("life")
    found = runstream.get_experiment_by_name("life")
    assert found is not None
    assert (found.experiment_id, dict(found.tags)) == (made, {"team": "a"})
    runstream.rename_experiment(made, "life two")
    assert runstream.get_experiment(made).name == "life two"
    assert runstream.get_experiment_by_name("life") is None
    with pytest.raises(runstream.InvalidInputError, match="life two"):
        runstream.create_experiment("life two")
    again = runstream.create_experiment("life")
    assert again != made  # the hash of the name is held by the renamed one
    assert runstream.set_experiment("life").experiment_id == again
    with pytest.raises(runstream.InvalidInputError, match="exists already"):
        runstream.rename_experiment(again, "life two")
    runstream.delete_experiment(made)
    assert made not in {each.experiment_id for each in runstream.search_experiments()}
    with pytest.raises(runstream.InvalidInputError, match="restore_experiment"):
        runstream.create_experiment("life two")
    runstream.restore_experiment(made)
    assert made in {each.experiment_id for each in runstream.search_experiments()}


def test_a_state_that_was_read_is_overruled_whatever_the_clock_says(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restoring from a host whose clock is behind writes a version above the deletion that it has seen."""
    from runstream_schemas import identity

    with runstream.start_run() as run:
        pass
    runstream.delete_run(run.info.run_id)
    assert runstream.get_run(run.info.run_id).info.lifecycle_stage == "deleted"
    versions: list[identity.Version] = []
    recorder = tracker.writer().recorder
    control = recorder.control

    def note(event: object, fields: dict[str, int]) -> identity.Version:
        versions.append(identity.Version(fields["time_ms"], fields["seq"], fields["writer"]))
        return control(event, fields)  # type: ignore[arg-type]

    an_hour_ago = identity.now_ms() - 3_600_000
    monkeypatch.setattr(identity, "now_ms", lambda: an_hour_ago)
    monkeypatch.setattr(recorder, "control", note)
    runstream.restore_run(run.info.run_id)
    assert versions[0].time_ms > an_hour_ago + 3_000_000
    monkeypatch.undo()
    assert runstream.get_run(run.info.run_id).info.lifecycle_stage == "active"


def test_parents_and_tables_of_several_runs(data: Path) -> None:
    """get_parent_run, and load_table over the experiment."""
    runstream.set_experiment("tables")
    with runstream.start_run() as outer:
        runstream.log_table({"a": [1]}, "t.json")
        with runstream.start_run(nested=True) as inner:
            runstream.log_table({"a": [2]}, "t.json")
    parent = runstream.get_parent_run(inner.info.run_id)
    assert parent is not None
    assert parent.info.run_id == outer.info.run_id
    assert runstream.get_parent_run(outer.info.run_id) is None
    frame = runstream.load_table("t.json", extra_columns=["run_id", "run_name"])
    assert sorted(frame["a"]) == [1, 2]
    assert dict(zip(frame["run_id"], frame["run_name"], strict=True)) == {
        outer.info.run_id: outer.info.run_name,
        inner.info.run_id: inner.info.run_name,
    }
    with pytest.raises(runstream.NotFoundError, match=r"none\.json"):
        runstream.load_table("none.json")


def test_search_runs_pages_through_everything(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """max_results counts over pages; names, ids and all experiments choose where to look."""
    from runstream import api_search

    monkeypatch.setattr(api_search, "_PAGE", 2)
    client = Client()
    identifier = runstream.create_experiment("pages")
    made = [client.create_run(identifier, run_name=f"r{i}").info.run_id for i in range(5)]
    for run_id in made:
        client.set_terminated(run_id)
    found = runstream.search_runs([identifier], order_by=["attributes.run_name ASC"], output_format="list")
    assert [run.info.run_id for run in found] == made
    assert len(runstream.search_runs(experiment_names=["pages"], max_results=3)) == 3
    assert len(runstream.search_runs(experiment_names=["no such"], output_format="list")) == 0
    assert {*made} <= set(runstream.search_runs(search_all_experiments=True)["run_id"])
    with pytest.raises(runstream.InvalidInputError):
        runstream.search_runs([identifier], "metrics.loss <<< 1")


def test_a_forked_child_reads_and_leaves(data: Path) -> None:
    """After the parent has read, a child reads by itself and exits normally."""
    runstream.search_experiments()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if runstream.search_experiments() else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_empty_results_are_empty_frames() -> None:
    """MLflow's columns are there even without runs."""
    assert list(runs_frame([]).columns) == [
        "run_id",
        "experiment_id",
        "status",
        "artifact_uri",
        "start_time",
        "end_time",
    ]


def test_a_store_that_cannot_be_reached_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Resuming by id goes on without the check, in bounded time, and says so."""
    before = tracker.override
    from runstream.config import Settings

    tracker.override = Settings.from_environment(
        {"RUNSTREAM_STORE_URI": "clickhouse://u:p@127.0.0.1:9/db"}, tracking_uri=tmp_path / "data"
    )
    try:
        with runstream.start_run(run_id="resumed-blindly") as run:
            assert run.info.run_id == "resumed-blindly"
        assert "could not be checked" in caplog.text
    finally:
        tracker.writer().recorder.close(10.0)
        tracker.override = before
