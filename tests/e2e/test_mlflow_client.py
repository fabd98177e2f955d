"""The unmodified MLflow package against a real `runstream server`: fluent API, MlflowClient, search, autolog, CLI."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mlflow_server import Served, served

mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow: pip install 'runstream[dev]'")

import requests  # noqa: E402  # one of mlflow's dependencies
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own warnings are not ours


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("mlflow") / "data") as running:
        yield running


@pytest.fixture
def client(server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[mlflow.MlflowClient]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    mlflow.set_tracking_uri(server.url)
    mlflow.set_registry_uri(server.url)
    yield mlflow.MlflowClient(server.url)
    mlflow.end_run()
    mlflow.set_tracking_uri(None)


@pytest.fixture
def experiment(client: mlflow.MlflowClient) -> str:
    return client.create_experiment(f"e-{uuid.uuid4().hex}")


@pytest.fixture
def run_id(client: mlflow.MlflowClient, experiment: str) -> str:
    return client.create_run(experiment).info.run_id


def refused(call, code: str) -> MlflowException:
    with pytest.raises(MlflowException) as caught:
        call()
    assert caught.value.error_code == code, caught.value
    return caught.value


# experiments


def test_default_experiment_exists(client):
    """Experiment 0 is called Default and is active."""
    found = client.get_experiment("0")
    assert (found.name, found.lifecycle_stage) == ("Default", "active")


def test_experiment_life(client):
    """Create, read, rename, tag, delete, restore: each is seen by the next read."""
    name = f"life-{uuid.uuid4().hex}"
    before = time.time_ns() // 1_000_000
    identity = client.create_experiment(name, tags={"a": "1", "b": "ü"})
    found = client.get_experiment(identity)
    assert found.name == name and found.tags == {"a": "1", "b": "ü"}
    assert found.artifact_location == f"mlflow-artifacts:/{identity}"
    assert before - 1000 <= found.creation_time <= time.time_ns() // 1_000_000 + 1000
    assert client.get_experiment_by_name(name).experiment_id == identity
    client.rename_experiment(identity, name + "-new")
    assert client.get_experiment(identity).name == name + "-new"
    assert client.get_experiment_by_name(name) is None
    client.set_experiment_tag(identity, "c", "3")
    client.set_experiment_tag(identity, "a", "2")
    assert client.get_experiment(identity).tags == {"a": "2", "b": "ü", "c": "3"}
    client.delete_experiment_tag(identity, "c")
    assert "c" not in client.get_experiment(identity).tags
    refused(lambda: client.delete_experiment_tag(identity, "c"), "RESOURCE_DOES_NOT_EXIST")
    client.delete_experiment(identity)
    assert client.get_experiment(identity).lifecycle_stage == "deleted"
    refused(lambda: client.delete_experiment(identity), "RESOURCE_DOES_NOT_EXIST")
    refused(lambda: client.set_experiment_tag(identity, "d", "4"), "INVALID_PARAMETER_VALUE")
    refused(lambda: client.create_run(identity), "INVALID_PARAMETER_VALUE")
    client.restore_experiment(identity)
    assert client.get_experiment(identity).lifecycle_stage == "active"
    refused(lambda: client.restore_experiment(identity), "RESOURCE_DOES_NOT_EXIST")


def test_experiment_names_are_unique(client):
    """A second experiment of a name is refused, also while the first is deleted; a renamed one frees its name."""
    name = f"unique-{uuid.uuid4().hex}"
    identity = client.create_experiment(name)
    refused(lambda: client.create_experiment(name), "RESOURCE_ALREADY_EXISTS")
    client.delete_experiment(identity)
    refused(lambda: client.create_experiment(name), "RESOURCE_ALREADY_EXISTS")
    client.restore_experiment(identity)
    client.rename_experiment(identity, name + "-moved")
    second = client.create_experiment(name)
    assert second != identity
    assert client.get_experiment_by_name(name).experiment_id == second
    refused(lambda: client.rename_experiment(second, name + "-moved"), "RESOURCE_ALREADY_EXISTS")


@pytest.mark.parametrize("name", ["", "x" * 501])
def test_bad_experiment_names_are_refused(client, name):
    """An empty or overlong name is a wrong parameter."""
    refused(lambda: client._tracking_client.store.create_experiment(name, None, []), "INVALID_PARAMETER_VALUE")


def test_unknown_experiment(client):
    """An id that nothing has is not found."""
    refused(lambda: client.get_experiment("123456789"), "RESOURCE_DOES_NOT_EXIST")


def test_search_experiments(client):
    """Filter, order, view type and pages of experiments."""
    mark = uuid.uuid4().hex[:12]
    ids = [client.create_experiment(f"s-{mark}-{i}", tags={"mark": mark}) for i in range(5)]
    client.delete_experiment(ids[4])
    found = client.search_experiments(filter_string=f"name LIKE 's-{mark}-%'", order_by=["name ASC"])
    assert [e.experiment_id for e in found] == ids[:4]
    gone = client.search_experiments(view_type=ViewType.DELETED_ONLY, filter_string=f"tags.mark = '{mark}'")
    assert [e.experiment_id for e in gone] == [ids[4]]
    everything = client.search_experiments(view_type=ViewType.ALL, filter_string=f"name LIKE 's-{mark}-%'")
    assert {e.experiment_id for e in everything} == set(ids)
    pages, token = [], None
    while True:
        page = client.search_experiments(
            filter_string=f"name LIKE 's-{mark}-%'", order_by=["name DESC"], max_results=3, page_token=token
        )
        pages.append([e.experiment_id for e in page])
        token = page.token
        if not token:
            break
    assert pages == [[ids[3], ids[2], ids[1]], [ids[0]]]
    refused(lambda: client.search_experiments(filter_string="bogus ~ 1"), "INVALID_PARAMETER_VALUE")
    refused(lambda: client.search_experiments(max_results=50_001), "INVALID_PARAMETER_VALUE")


# runs


def test_run_life(client, experiment):
    """What is given at creation comes back, and each change is seen by the next read."""
    made = client.create_run(experiment, start_time=1234, tags={"t": "v"}, run_name="first")
    run = client.get_run(made.info.run_id)
    assert run.info.experiment_id == experiment and run.info.start_time == 1234 and run.info.end_time is None
    assert run.info.run_name == "first" and run.data.tags == {"t": "v", "mlflow.runName": "first"}
    assert run.info.status == "RUNNING" and run.info.lifecycle_stage == "active"
    assert run.info.artifact_uri == f"mlflow-artifacts:/{experiment}/{run.info.run_id}/artifacts"
    client.set_terminated(run.info.run_id, "FAILED", 5678)
    run = client.get_run(run.info.run_id)
    assert (run.info.status, run.info.end_time) == ("FAILED", 5678)
    client.update_run(run.info.run_id, status="RUNNING", name="second")
    run = client.get_run(run.info.run_id)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "second")
    assert run.data.tags["mlflow.runName"] == "second"
    client.delete_run(run.info.run_id)
    assert client.get_run(run.info.run_id).info.lifecycle_stage == "deleted"
    for call in (
        lambda: client.log_metric(run.info.run_id, "m", 1),
        lambda: client.log_param(run.info.run_id, "p", 1),
        lambda: client.set_tag(run.info.run_id, "t", 1),
        lambda: client.delete_tag(run.info.run_id, "t"),
        lambda: client.update_run(run.info.run_id, status="FINISHED"),
        lambda: client.log_batch(run.info.run_id, metrics=[Metric("m", 1, 1, 1)]),
    ):
        assert "must be in the 'active' state" in refused(call, "INVALID_PARAMETER_VALUE").message
    client.restore_run(run.info.run_id)
    client.log_metric(run.info.run_id, "m", 1)
    assert client.get_run(run.info.run_id).data.metrics == {"m": 1}


def test_run_without_name_gets_one(client, run_id):
    """A run without a name has a random one, as a tag too."""
    run = client.get_run(run_id)
    assert run.info.run_name and run.data.tags["mlflow.runName"] == run.info.run_name


def test_contradicting_run_names_are_refused(client, experiment):
    """run_name and the mlflow.runName tag must agree."""
    refused(
        lambda: client.create_run(experiment, run_name="a", tags={"mlflow.runName": "b"}), "INVALID_PARAMETER_VALUE"
    )


def test_unknown_run(client):
    """Reading and writing an unknown run is not found."""
    refused(lambda: client.get_run("nope"), "RESOURCE_DOES_NOT_EXIST")
    refused(lambda: client.log_metric("0" * 32, "m", 1), "RESOURCE_DOES_NOT_EXIST")


def test_deleting_an_experiment_deletes_its_runs(client, experiment, run_id):
    """Runs follow their experiment, and come back with it."""
    client.delete_experiment(experiment)
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"
    refused(lambda: client.log_metric(run_id, "m", 1), "INVALID_PARAMETER_VALUE")
    client.restore_experiment(experiment)
    assert client.get_run(run_id).info.lifecycle_stage == "active"
    client.log_metric(run_id, "m", 1)


# params and tags


def test_params(client, run_id):
    """A param may be logged again with its value, never with another; the limits hold; long values are cut."""
    client.log_param(run_id, "lr", 0.1)
    client.log_param(run_id, "lr", 0.1)
    refused(lambda: client.log_param(run_id, "lr", 0.2), "INVALID_PARAMETER_VALUE")
    client.log_batch(run_id, params=[Param("lr", "0.1"), Param("depth", "3"), Param("ü/x y", "")])
    message = refused(lambda: client.log_batch(run_id, params=[Param("lr", "1")]), "INVALID_PARAMETER_VALUE").message
    assert "Changing param values is not allowed" in message
    refused(lambda: client.log_batch(run_id, params=[Param("d", "1"), Param("d", "1")]), "INVALID_PARAMETER_VALUE")
    client.log_param(run_id, "long", "x" * 7000)
    params = client.get_run(run_id).data.params
    assert params == {"lr": "0.1", "depth": "3", "ü/x y": "", "long": "x" * 6000}


def test_tags(client, run_id):
    """Tags are overwritten in the order of the calls, and deleted; the name tag renames the run."""
    for value in range(20):
        client.set_tag(run_id, "n", value)
    client.log_batch(run_id, tags=[RunTag("a", "1"), RunTag("a", "2"), RunTag("long", "y" * 9000)])
    tags = client.get_run(run_id).data.tags
    assert tags["n"] == "19" and tags["a"] == "2" and tags["long"] == "y" * 8000
    client.delete_tag(run_id, "a")
    assert "a" not in client.get_run(run_id).data.tags
    refused(lambda: client.delete_tag(run_id, "a"), "RESOURCE_DOES_NOT_EXIST")
    client.set_tag(run_id, "mlflow.runName", "renamed")
    assert client.get_run(run_id).info.run_name == "renamed"


@pytest.mark.parametrize("key", ["", "/abs", "a/../b", "..", "a//b", "new\nline", "semi;colon", "x" * 251])
def test_bad_names_are_refused(client, run_id, key):
    """Names that are no safe relative paths, have strange characters or are too long are wrong parameters."""
    store = client._tracking_client.store
    refused(lambda: store.log_metric(run_id, Metric(key, 1.0, 1, 0)), "INVALID_PARAMETER_VALUE")
    refused(lambda: store.log_param(run_id, Param(key, "v")), "INVALID_PARAMETER_VALUE")
    refused(lambda: store.set_tag(run_id, RunTag(key, "v")), "INVALID_PARAMETER_VALUE")


def test_batch_limits(client, run_id):
    """A batch above MLflow's limits is refused whole."""
    store = client._tracking_client.store
    many = [Metric("m", 1.0, i, i) for i in range(1001)]
    refused(lambda: store.log_batch(run_id, many, [], []), "INVALID_PARAMETER_VALUE")
    refused(lambda: store.log_batch(run_id, [], [Param(str(i), "") for i in range(101)], []), "INVALID_PARAMETER_VALUE")
    refused(
        lambda: store.log_batch(run_id, [], [], [RunTag(str(i), "") for i in range(101)]), "INVALID_PARAMETER_VALUE"
    )
    refused(
        lambda: store.log_batch(run_id, many[:950], [Param(str(i), "") for i in range(60)], []),
        "INVALID_PARAMETER_VALUE",
    )
    data = client.get_run(run_id).data
    assert data.metrics == {} and data.params == {}


# metrics


def test_latest_metric_is_the_largest_step_then_time_then_value(client, run_id):
    """MLflow's rule for the value that a run shows, whatever the order of arrival."""
    for value, timestamp, step in [(3.0, 30, 1), (1.0, 10, 2), (2.0, 20, 2), (9.0, 5, 2), (1.5, 20, 2), (7.0, 99, -5)]:
        client.log_metric(run_id, "m", value, timestamp=timestamp, step=step)
    run = client.get_run(run_id)
    assert run.data.metrics == {"m": 2.0}
    (latest,) = run.data._metric_objs
    assert (latest.timestamp, latest.step) == (20, 2)
    history = client.get_metric_history(run_id, "m")
    assert [(m.value, m.timestamp, m.step) for m in history] == [
        (9.0, 5, 2), (1.0, 10, 2), (1.5, 20, 2), (2.0, 20, 2), (3.0, 30, 1), (7.0, 99, -5),
    ]  # fmt: skip


def test_special_values(client, run_id):
    """NaN stays NaN; infinities become the largest doubles; zero has no sign."""
    for step, value in enumerate([math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308]):
        client.log_metric(run_id, "m", value, timestamp=1, step=step)
    values = [m.value for m in sorted(client.get_metric_history(run_id, "m"), key=lambda m: m.step)]
    assert math.isnan(values[0])
    assert values[1:] == [1.7976931348623157e308, -1.7976931348623157e308, 0.0, 5e-324, 1.7976931348623157e308]
    assert math.copysign(1, values[3]) == 1
    client.log_metric(run_id, "nan", math.nan)
    assert math.isnan(client.get_run(run_id).data.metrics["nan"])


def test_equal_points_are_one(client, run_id):
    """The same key, time, step and value counts once (a retry); another value is another point."""
    for _ in range(3):
        client.log_metric(run_id, "m", 1.0, timestamp=1, step=1)
        client.log_metric(run_id, "n", math.nan, timestamp=1, step=1)
    client.log_batch(run_id, metrics=[Metric("m", 1.0, 1, 1), Metric("m", 1.0, 1, 1), Metric("m", 2.0, 1, 1)])
    assert [m.value for m in client.get_metric_history(run_id, "m")] == [1.0, 2.0]
    assert len(client.get_metric_history(run_id, "n")) == 1


def test_large_steps_and_times(client, run_id):
    """64-bit steps survive; a time before 1970 or after 2262 is refused."""
    for step in (2**63 - 1, -(2**63)):
        client.log_metric(run_id, "m", 1.0, timestamp=1, step=step)
    assert {m.step for m in client.get_metric_history(run_id, "m")} == {2**63 - 1, -(2**63)}
    refused(lambda: client.log_metric(run_id, "m", 1.0, timestamp=-1), "INVALID_PARAMETER_VALUE")
    refused(lambda: client.log_metric(run_id, "m", 1.0, timestamp=2**60), "INVALID_PARAMETER_VALUE")


def test_history_pages(client, run_id):
    """A paged history has every point once, in order."""
    metrics = [Metric("m", float(i), i, i) for i in range(2500)]
    for start in range(0, 2500, 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    assert [m.value for m in client.get_metric_history(run_id, "m")] == [float(i) for i in range(2500)]
    store = client._tracking_client.store
    got, token = [], None
    while True:
        page = store.get_metric_history(run_id, "m", max_results=999, page_token=token)
        got += [m.step for m in page]
        token = page.token
        if not token:
            break
    assert got == list(range(2500))
    assert client.get_metric_history(run_id, "other") == []


def test_sampled_history(client, run_id, server):
    """The sampled history keeps the ends and at most max_results points a run."""
    for start in range(0, 3000, 1000):
        client.log_batch(run_id, metrics=[Metric("m", float(i), i, i) for i in range(start, start + 1000)])

    def steps(**query):
        url = f"{server.url}/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval"
        answer = requests.get(url, params={"run_ids": [run_id], "metric_key": "m", **query}, timeout=30)
        assert answer.status_code == 200, answer.text
        return [point["step"] for point in answer.json()["metrics"]]

    found = steps(max_results=10)
    assert len(found) == 10 and found[0] == 0 and found[-1] == 2999 and found == sorted(found)
    assert steps(max_results=1) == [2999]
    assert steps(max_results=2500)[-1] == 2999 and len(steps(max_results=2500)) == 2500
    assert steps(start_step=100, end_step=200) == list(range(100, 201))


# search


def test_search_runs(client, experiment):
    """Filters over metrics, params, tags and attributes; order; pages; view types."""
    ids = []
    for i in range(6):
        run = client.create_run(experiment, start_time=1000 + i, run_name=f"run-{i}")
        ids.append(run.info.run_id)
        client.log_batch(
            run.info.run_id,
            metrics=[Metric("loss", 1.0 - i / 10, 1, 1)],
            params=[Param("lr", str(i))],
            tags=[RunTag("kind", "even" if i % 2 == 0 else "odd")],
        )
    client.set_terminated(ids[0])
    client.delete_run(ids[5])

    def search(text="", **more):
        return [run.info.run_id for run in client.search_runs([experiment], text, **more)]

    assert search() == [ids[4], ids[3], ids[2], ids[1], ids[0]]
    assert search("metrics.loss < 0.75", order_by=["metrics.loss ASC"]) == [ids[4], ids[3]]
    assert search("params.lr = '3'") == [ids[3]]
    assert search("tags.kind = 'even' and metrics.loss > 0.5", order_by=["start_time ASC"]) == [ids[0], ids[2], ids[4]]
    assert search("attributes.status = 'FINISHED'") == [ids[0]]
    assert search("run_name LIKE 'run-%' AND tags.kind != 'even'") == [ids[3], ids[1]]
    assert search(f"run_id IN ('{ids[1]}', '{ids[2]}')") == [ids[2], ids[1]]
    assert search(run_view_type=ViewType.DELETED_ONLY) == [ids[5]]
    assert set(search(run_view_type=ViewType.ALL)) == set(ids)
    first = client.search_runs([experiment], order_by=["params.lr ASC"], max_results=2)
    second = client.search_runs([experiment], order_by=["params.lr ASC"], max_results=2, page_token=first.token)
    assert [r.info.run_id for r in first] == ids[:2] and [r.info.run_id for r in second] == ids[2:4]
    assert search("metrics.absent > 0") == []
    refused(lambda: client.search_runs([experiment], "metrics.loss ~ 1"), "INVALID_PARAMETER_VALUE")
    refused(lambda: client.search_runs([experiment], max_results=50_001), "INVALID_PARAMETER_VALUE")
    frame = mlflow.search_runs(experiment_ids=[experiment], order_by=["start_time ASC"])
    assert list(frame["params.lr"]) == ["0", "1", "2", "3", "4"]
    assert frame["metrics.loss"].tolist() == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])


# inputs


def test_inputs(client, run_id, experiment):
    """Data sets come back with the run, and once only."""
    dataset = Dataset("iris", "abc123", "local", "/tmp/x.csv", schema='{"a": 1}', profile='{"rows": 3}')
    entry = DatasetInput(dataset, [InputTag("mlflow.data.context", "training"), InputTag("k", "v")])
    client.log_inputs(run_id, [entry])
    client.log_inputs(run_id, [entry])
    (found,) = client.get_run(run_id).inputs.dataset_inputs
    assert found.dataset == dataset or found.dataset.to_dictionary() == dataset.to_dictionary()
    assert {tag.key: tag.value for tag in found.tags} == {"mlflow.data.context": "training", "k": "v"}
    assert [r.info.run_id for r in client.search_runs([experiment], "datasets.name = 'iris'")] == [run_id]


# artifacts


def test_artifacts(client, run_id, tmp_path):
    """Files and folders go up, are listed, come down and are the same."""
    (tmp_path / "tree" / "sub dir").mkdir(parents=True)
    (tmp_path / "tree" / "a.txt").write_text("alpha")
    (tmp_path / "tree" / "sub dir" / "ü 100%.bin").write_bytes(os.urandom(3_000_000))
    client.log_artifacts(run_id, str(tmp_path / "tree"), "kept")
    client.log_artifact(run_id, str(tmp_path / "tree" / "a.txt"))
    client.log_dict(run_id, {"x": 1}, "d/x.json")
    assert [(f.path, f.is_dir, f.file_size) for f in client.list_artifacts(run_id)] == [
        ("a.txt", False, 5), ("d", True, None), ("kept", True, None),
    ]  # fmt: skip
    assert [(f.path, f.is_dir) for f in client.list_artifacts(run_id, "kept")] == [
        ("kept/a.txt", False), ("kept/sub dir", True),
    ]  # fmt: skip
    down = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    assert (down / "kept" / "a.txt").read_text() == "alpha"
    sent = (tmp_path / "tree" / "sub dir" / "ü 100%.bin").read_bytes()
    assert (down / "kept" / "sub dir" / "ü 100%.bin").read_bytes() == sent
    assert client.list_artifacts(run_id, "nothing") == []


# fluent API and autologging


def test_fluent_api(client):
    """set_experiment, nested runs, log_*, active_run and an exception in the body."""
    name = f"fluent-{uuid.uuid4().hex}"
    mlflow.set_experiment(name)
    with mlflow.start_run(run_name="parent", description="about") as parent:
        mlflow.log_params({"a": 1, "b": "x"})
        mlflow.log_metrics({"m": 1.0, "n": 2.0}, step=3)
        mlflow.set_tags({"t": "u"})
        mlflow.log_text("hello", "note.txt")
        with mlflow.start_run(run_name="child", nested=True) as child:
            mlflow.log_metric("m", 5)
    run = client.get_run(parent.info.run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"a": "1", "b": "x"}
    assert run.data.tags["mlflow.note.content"] == "about"
    assert client.get_run(child.info.run_id).data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/note.txt") == "hello"
    with pytest.raises(KeyError), mlflow.start_run() as broken:
        raise KeyError("x")
    assert client.get_run(broken.info.run_id).info.status == "FAILED"
    with mlflow.start_run(run_id=parent.info.run_id):
        mlflow.log_metric("later", 1)
    assert client.get_run(parent.info.run_id).data.metrics["later"] == 1


def test_sklearn_autolog(client):
    """Autologging of scikit-learn logs params, metrics, data sets and a model that can be loaded again."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    from sklearn.linear_model import LogisticRegression

    mlflow.set_experiment(f"autolog-{uuid.uuid4().hex}")
    mlflow.sklearn.autolog(log_input_examples=False, silent=True)
    try:
        inputs, target = datasets.load_iris(return_X_y=True)
        with mlflow.start_run() as active:
            model = LogisticRegression(max_iter=200).fit(inputs, target)
    finally:
        mlflow.sklearn.autolog(disable=True)
    run = client.get_run(active.info.run_id)
    assert run.data.params["max_iter"] == "200"
    assert run.data.metrics["training_accuracy_score"] == pytest.approx(model.score(inputs, target))
    assert run.inputs.dataset_inputs
    (output,) = run.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert logged.status == "READY" and logged.source_run_id == active.info.run_id
    again = mlflow.sklearn.load_model(f"models:/{output.model_id}")
    assert (again.predict(inputs) == model.predict(inputs)).all()


def test_logged_models(client, experiment, run_id):
    """Logged models: make, tag, finish, measure, search, delete."""
    made = [
        client.create_logged_model(
            experiment,
            name=f"model-{i}",
            source_run_id=run_id,
            model_type="agent",
            params={"p": str(i)},
            tags={"t": "u"},
        )
        for i in range(3)
    ]
    assert made[0].status == "PENDING"
    client.finalize_logged_model(made[0].model_id, "READY")
    client.set_logged_model_tags(made[0].model_id, {"t": "new", "x": "y"})
    client.delete_logged_model_tag(made[0].model_id, "x")
    for i, model in enumerate(made):
        client.log_metric(run_id, "acc", i / 10, model_id=model.model_id, dataset_name="d", dataset_digest="1")
    found = client.get_logged_model(made[0].model_id)
    assert found.status == "READY" and found.tags == {"t": "new"} and found.params == {"p": "0"}
    assert [(m.key, m.value, m.dataset_name) for m in found.metrics] == [("acc", 0.0, "d")]
    ids = [m.model_id for m in client.search_logged_models([experiment], order_by=[{"field_name": "metrics.acc"}])]
    assert ids == [m.model_id for m in made]
    ids = [m.model_id for m in client.search_logged_models([experiment], filter_string="metrics.acc > 0.05")]
    assert set(ids) == {made[1].model_id, made[2].model_id}
    assert [
        m.model_id
        for m in client.search_logged_models([experiment], filter_string="params.p = '2' AND name = 'model-2'")
    ] == [made[2].model_id]
    page = client.search_logged_models([experiment], max_results=2)
    rest = client.search_logged_models([experiment], max_results=2, page_token=page.token)
    assert len(page) == 2 and len(rest) == 1 and rest.token is None
    client.delete_logged_model(made[2].model_id)
    refused(lambda: client.get_logged_model(made[2].model_id), "RESOURCE_DOES_NOT_EXIST")
    refused(lambda: client.search_logged_models([experiment], filter_string="bogus = 'x'"), "INVALID_PARAMETER_VALUE")


def test_command_line(client, server):
    """MLflow's own command creates and lists experiments and runs."""

    def mlflow_command(*arguments: str) -> str:
        env = {**os.environ, "MLFLOW_TRACKING_URI": server.url}
        done = subprocess.run(
            [sys.executable, "-m", "mlflow", *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    name = f"cli-{uuid.uuid4().hex}"
    mlflow_command("experiments", "create", "--experiment-name", name)
    identity = client.get_experiment_by_name(name).experiment_id
    assert name in mlflow_command("experiments", "search")
    run = client.create_run(identity, run_name="from-python")
    assert run.info.run_id in mlflow_command("runs", "list", "--experiment-id", identity)
    mlflow_command("runs", "delete", "--run-id", run.info.run_id)
    assert client.get_run(run.info.run_id).info.lifecycle_stage == "deleted"
