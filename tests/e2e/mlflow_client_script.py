"""One life of experiments and runs through an `mlflow` of any release since 2.0; exits 1 at the first surprise.

Run as a program with the address of a server: the tests run it with this environment's mlflow and, where they have
one, with an older release in an environment of its own. Needs nothing but mlflow.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import mlflow
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

checks = 0


def equal(found: object, expected: object) -> None:
    """Count one check."""
    global checks
    checks += 1
    if found != expected:
        raise SystemExit(f"check {checks}: expected {expected!r}, found {found!r}")


def refused(call: object, *args: object, code: str, **kwargs: object) -> None:
    """The call must fail with MLflow's error code."""
    try:
        call(*args, **kwargs)  # type: ignore[operator]
    except MlflowException as exc:
        equal(exc.error_code, code)
    else:
        raise SystemExit(f"check {checks + 1}: {call} should have been refused")


def experiments(client: MlflowClient, name: str) -> str:
    """Create, tag, search, rename, delete, restore."""
    identity = client.create_experiment(name, tags={"team": "vision"})
    refused(client.create_experiment, name, code="RESOURCE_ALREADY_EXISTS")
    equal(client.get_experiment_by_name(name).experiment_id, identity)
    equal(client.get_experiment_by_name(name + " absent"), None)
    client.set_experiment_tag(identity, "more", "a\nb")
    equal(client.get_experiment(identity).tags, {"team": "vision", "more": "a\nb"})
    found = client.search_experiments(filter_string=f"name = '{name}' AND tags.team = 'vision'")
    equal([item.experiment_id for item in found], [identity])
    client.delete_experiment(identity)
    equal(client.get_experiment(identity).lifecycle_stage, "deleted")
    deleted = client.search_experiments(view_type=ViewType.DELETED_ONLY, filter_string=f"name = '{name}'")
    equal(len(deleted), 1)
    client.restore_experiment(identity)
    client.rename_experiment(identity, name + " renamed")
    equal(client.get_experiment(identity).name, name + " renamed")
    return identity


def runs(client: MlflowClient, experiment: str) -> str:
    """Write and read everything a run holds."""
    run = client.create_run(experiment, start_time=456, run_name="first", tags={"mlflow.user": "me"})
    run_id = run.info.run_id
    equal((run.info.status, run.info.start_time, run.info.run_name), ("RUNNING", 456, "first"))
    client.log_param(run_id, "depth", 3)
    client.log_param(run_id, "depth", 3)
    refused(client.log_param, run_id, "depth", 4, code="INVALID_PARAMETER_VALUE")
    client.log_metric(run_id, "loss", 0.5, timestamp=789, step=2)
    client.log_metric(run_id, "nan", math.nan)
    client.log_metric(run_id, "up", math.inf)
    client.set_tag(run_id, "gone", "x")
    client.delete_tag(run_id, "gone")
    refused(client.delete_tag, run_id, "gone", code="RESOURCE_DOES_NOT_EXIST")
    client.log_batch(
        run_id,
        metrics=[Metric("loss", 0.25, 800, step) for step in range(3, 13)],
        params=[Param("empty", "")],
        tags=[RunTag("k", "v")],
    )
    client.set_terminated(run_id, "FAILED", end_time=1000)
    found = client.get_run(run_id)
    equal((found.info.status, found.info.end_time), ("FAILED", 1000))
    equal(found.data.params, {"depth": "3", "empty": ""})
    equal(found.data.metrics["loss"], 0.25)
    equal(math.isnan(found.data.metrics["nan"]), True)
    equal(found.data.metrics["up"], sys.float_info.max)
    equal({key: found.data.tags[key] for key in ("k", "mlflow.user", "mlflow.runName")}["k"], "v")
    history = client.get_metric_history(run_id, "loss")
    equal([(point.value, point.step) for point in history][:2], [(0.5, 2), (0.25, 3)])
    equal(len(history), 11)
    client.delete_run(run_id)
    refused(client.log_metric, run_id, "loss", 1.0, code="INVALID_PARAMETER_VALUE")
    client.restore_run(run_id)
    equal(client.get_run(run_id).info.lifecycle_stage, "active")
    refused(client.get_run, "0" * 32, code="RESOURCE_DOES_NOT_EXIST")
    return run_id


def searches(client: MlflowClient, experiment: str, first: str) -> None:
    """Filters, orders and pages."""
    others = [client.create_run(experiment, start_time=1, run_name=f"r{number}").info.run_id for number in range(4)]
    for number, run_id in enumerate(others):
        client.log_metric(run_id, "loss", float(number))
    equal([run.info.run_id for run in client.search_runs([experiment], "params.depth = '3'")], [first])
    ordered = client.search_runs([experiment], "metrics.loss >= 0", order_by=["metrics.loss DESC"], max_results=3)
    equal([run.info.run_id for run in ordered], [others[3], others[2], others[1]])
    rest = client.search_runs(
        [experiment], "metrics.loss >= 0", order_by=["metrics.loss DESC"], max_results=3, page_token=ordered.token
    )
    equal([run.info.run_id for run in rest], [first, others[0]])
    equal(rest.token, None)
    refused(client.search_runs, [experiment], "nonsense =", code="INVALID_PARAMETER_VALUE")


def fluent(name: str) -> None:
    """The calls of a training script, with artifacts."""
    mlflow.set_experiment(name)
    with mlflow.start_run(run_name="parent", description="words") as parent:
        mlflow.log_params({"a": 1, "b": "two"})
        mlflow.log_metrics({"m": 1.0, "n": 2.0}, step=5)
        mlflow.set_tags({"t": "u"})
        mlflow.log_text("hello", "notes/hello.txt")
        mlflow.log_dict({"a": [1, 2]}, "data.json")
        with mlflow.start_run(nested=True) as child:
            mlflow.log_metric("inner", 1)
    found = mlflow.get_run(parent.info.run_id)
    equal(found.info.status, "FINISHED")
    equal(found.data.params, {"a": "1", "b": "two"})
    equal(found.data.tags["mlflow.note.content"], "words")
    equal(mlflow.get_run(child.info.run_id).data.tags["mlflow.parentRunId"], parent.info.run_id)
    client = MlflowClient()
    equal(sorted(item.path for item in client.list_artifacts(parent.info.run_id)), ["data.json", "notes"])
    equal(mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/notes/hello.txt"), "hello")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "deep", "x.bin")
        source.parent.mkdir()
        source.write_bytes(bytes(range(256)) * 100)
        client.log_artifacts(parent.info.run_id, folder, "tree")
        target = Path(folder, "back")
        target.mkdir()
        got = client.download_artifacts(parent.info.run_id, "tree/deep/x.bin", str(target))
        equal(Path(got).read_bytes(), source.read_bytes())


def main(url: str, name: str) -> None:
    """All of it."""
    mlflow.set_tracking_uri(url)
    client = MlflowClient()
    experiment = experiments(client, name)
    searches(client, experiment, runs(client, experiment))
    fluent(name + " fluent")
    print("mlflow", mlflow.__version__, "checks", checks)


if __name__ == "__main__":
    main(*sys.argv[1:])
