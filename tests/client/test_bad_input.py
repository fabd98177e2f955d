"""Every public call with wrong, huge, empty, Unicode, control-character, surrogate and duplicate input.

Each is an InvalidInputError (a ValueError) that names what is wrong, comes at the call, and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import runstream
from runstream import Client, InvalidInputError
from runstream.entities import Metric, Param, RunTag
from runstream.testing import Recording, recording
from runstream_schemas import limits

BAD_TEXT: list[Any] = [None, 3, 1.5, b"bytes", ["list"], "", "half \ud800 pair", "x" * 100_000]
BAD_KEYS: list[Any] = [*BAD_TEXT, "tab\there", "nul\x00", "line\nbreak", "bell\x07", "x" * 251, "quote'", 'quote"']
BAD_NAMES: list[Any] = [*BAD_TEXT, "line\nbreak", "nul\x00", "x" * 501]
BAD_RUN_IDS: list[Any] = [3, b"x", "", "-x", "_x", "a b", "a/b", "../x", "x" * 257, "ü", "a\n", "\ud800"]
BAD_VALUES: list[Any] = ["half \ud800 pair", "x" * 65_537]
BAD_NUMBERS: list[Any] = ["1.0", "abc", None, [1.0], b"1", object(), 1j, {"a": 1}, ""]
BAD_STEPS: list[Any] = ["1", 1.5, [1], 1 << 63, -(1 << 63) - 1, object()]
BAD_TIMES: list[Any] = ["1", -1, limits.MAX_TIME_MS, 1 << 70, [1], object()]
BAD_PATHS: list[Any] = ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "a\x00b", "%2e%2e/x", "x" * 1001, 3, b"x"]


@pytest.fixture(scope="module")
def recorded() -> Iterator[Recording]:
    with recording() as recorded, runstream.start_run():
        yield recorded


def run_id() -> str:
    run = runstream.active_run()
    assert run is not None
    return run.info.run_id


CALLS: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "log_metric key": (lambda bad: runstream.log_metric(bad, 1.0), BAD_KEYS),
    "log_metric value": (lambda bad: runstream.log_metric("k", bad), BAD_NUMBERS),
    "log_metric step": (lambda bad: runstream.log_metric("k", 1.0, bad), BAD_STEPS),
    "log_metric timestamp": (lambda bad: runstream.log_metric("k", 1.0, timestamp=bad), BAD_TIMES),
    "log_metric run_id": (lambda bad: runstream.log_metric("k", 1.0, run_id=bad), BAD_RUN_IDS),
    "log_metrics": (runstream.log_metrics, [None, 3, "text", [("a", 1)]]),
    "log_metrics key": (lambda bad: runstream.log_metrics({"ok": 1.0, bad: 1.0}), [3, None, "", "\ud800", "nul\x00"]),
    "log_metrics value": (lambda bad: runstream.log_metrics({"k": bad, "ok": 1.0}), BAD_NUMBERS),
    "log_metrics step": (lambda bad: runstream.log_metrics({"k": 1.0}, bad), BAD_STEPS),
    "log_metrics timestamp": (lambda bad: runstream.log_metrics({"k": 1.0}, timestamp=bad), BAD_TIMES),
    "log_param key": (lambda bad: runstream.log_param(bad, 1), BAD_KEYS),
    "log_param value": (lambda bad: runstream.log_param("k", bad), BAD_VALUES),
    "log_params": (runstream.log_params, [None, 3, "text", [("a", 1)], {"ok": 1, "": 2}]),
    "log_params run_id": (lambda bad: runstream.log_params({"a": 1}, run_id=bad), BAD_RUN_IDS),
    "set_tag key": (lambda bad: runstream.set_tag(bad, 1), BAD_KEYS),
    "set_tag value": (lambda bad: runstream.set_tag("k", bad), BAD_VALUES),
    "set_tags": (runstream.set_tags, [None, 3, "text", [("a", 1)]]),
    "delete_tag": (runstream.delete_tag, BAD_KEYS),
    "set_experiment": (runstream.set_experiment, [*BAD_NAMES, "   "]),
    "set_experiment id": (lambda bad: runstream.set_experiment(experiment_id=bad), ["", "a b", "x" * 65, 1.5, "../x"]),
    "create_experiment": (runstream.create_experiment, [*BAD_NAMES, "   "]),
    "create_experiment location": (lambda bad: runstream.create_experiment("e", bad), ["", "  ", 3, "a\x00"]),
    "create_experiment tags": (lambda bad: runstream.create_experiment("e", tags=bad), ["x", {"": 1}, {"a": "\ud800"}]),
    "rename_experiment": (lambda bad: runstream.rename_experiment("5", bad), BAD_NAMES),
    "delete_experiment": (runstream.delete_experiment, [None, "", "a b", 1.5]),
    "set_experiment_tag": (lambda bad: runstream.set_experiment_tag(bad, 1), BAD_KEYS),
    "set_experiment_tag value": (lambda bad: runstream.set_experiment_tag("k", bad), BAD_VALUES),
    "start_run run_id": (lambda bad: runstream.start_run(bad, nested=True), BAD_RUN_IDS),
    "start_run experiment_id": (lambda bad: runstream.start_run(experiment_id=bad, nested=True), ["", "a b", 1.5]),
    "start_run name": (lambda bad: runstream.start_run(run_name=bad, nested=True), BAD_NAMES[1:]),
    "start_run parent": (lambda bad: runstream.start_run(parent_run_id=bad, nested=True), BAD_RUN_IDS),
    "start_run tags": (lambda bad: runstream.start_run(tags=bad, nested=True), ["x", 3, {"": 1}, {3: 1}]),
    "start_run description": (lambda bad: runstream.start_run(description=bad, nested=True), [3, "", "\ud800"]),
    "end_run": (runstream.end_run, ["", "DONE", None, 3, "finished", "RUNNING "]),
    "delete_run": (runstream.delete_run, [None, *BAD_RUN_IDS]),
    "restore_run": (runstream.restore_run, [None, *BAD_RUN_IDS]),
    "log_input": (runstream.log_input, [None, 3, [1], object(), ""]),
    "log_input context": (lambda bad: runstream.log_input(name="d", context=bad), [3, "\ud800", "x" * 251]),
    "log_input tags": (lambda bad: runstream.log_input(name="d", tags=bad), ["x", {"": 1}]),
    "log_input size": (
        lambda bad: runstream.log_input(name="d", source=bad, schema=bad),
        ["x" * 500_000, "x" * 1_000_001],
    ),
    "log_text": (lambda bad: runstream.log_text(bad, "a.txt"), [None, 3, b"x", "\ud800"]),
    "log_text file": (lambda bad: runstream.log_text("x", bad), [*BAD_PATHS, None]),
    "log_dict": (lambda bad: runstream.log_dict(bad, "a.json"), [None, 3, "x"]),
    "log_figure": (lambda bad: runstream.log_figure(bad, "a.png"), [None, 3, "x"]),
    "log_image": (lambda bad: runstream.log_image(bad, "a.png"), [None, 3, "x", [[1]]]),
    "log_image key": (lambda bad: runstream.log_image([[1]], key=bad), ["", "nul\x00", 3]),
    "log_table": (lambda bad: runstream.log_table(bad, "a.json"), [None, 3, "x", {"a": [1], "b": []}]),
    "log_table file": (lambda bad: runstream.log_table({"a": 1}, bad), [*BAD_PATHS, "a.csv"]),
    "log_artifact": (runstream.log_artifact, ["/no/such/file", "", "a\x00b", None, 3, b"x"]),
    "log_artifacts": (runstream.log_artifacts, ["/no/such/folder", "/etc/hostname", "", None, 3]),
    "log_artifact path": (lambda bad: runstream.log_artifact(__file__, bad), ["/abs", "../x", "a\x00", 3, "\ud800"]),
    "get_artifact_uri": (runstream.get_artifact_uri, ["/abs", "../x", "%2e%2e", 3]),
    "list_artifacts": (lambda bad: runstream.list_artifacts(run_id=run_id(), artifact_path=bad), ["/abs", "..", 3]),
    "list_artifacts nothing": (lambda bad: runstream.list_artifacts(), [None]),
    "download_artifacts": (
        lambda bad: runstream.download_artifacts(run_id=run_id(), artifact_path=bad),
        ["/abs", "..", 3],
    ),
    "search_runs format": (lambda bad: runstream.search_runs(output_format=bad), ["csv", None, 3]),
    "search_runs max": (lambda bad: runstream.search_runs(max_results=bad), [-1, "5", None, 1.5, True]),
    "search_runs both": (
        lambda bad: runstream.search_runs(experiment_ids=["0"], experiment_names=["Default"]),
        [None],
    ),
    "sql format": (lambda bad: runstream.sql("SELECT 1", output_format=bad), ["csv", None]),
    "metric_history format": (lambda bad: runstream.metric_history("r", "k", output_format=bad), ["csv", None]),
    "Client create_run": (lambda bad: Client().create_run(bad), [None, "", "a b"]),
    "Client create_run name": (lambda bad: Client().create_run("0", run_name=bad), BAD_NAMES[1:]),
    "Client create_run time": (lambda bad: Client().create_run("0", bad), ["1", -1, limits.MAX_TIME_MS, True]),
    "Client get_run": (lambda bad: Client().get_run(bad), [None, *BAD_RUN_IDS]),
    "Client log_metric": (lambda bad: Client().log_metric(bad, "k", 1.0), [None, *BAD_RUN_IDS]),
    "Client log_param": (lambda bad: Client().log_param(bad, "k", 1), [None, *BAD_RUN_IDS]),
    "Client set_tag": (lambda bad: Client().set_tag(bad, "k", 1), [None, *BAD_RUN_IDS]),
    "Client set_terminated": (lambda bad: Client().set_terminated(run_id(), bad), ["", "DONE", 3]),
    "Client set_terminated time": (lambda bad: Client().set_terminated(run_id(), end_time=bad), ["1", -1, 1 << 60]),
    "Client update_run": (lambda bad: Client().update_run(run_id(), bad), ["", "DONE", 3]),
    "Client log_batch metrics": (
        lambda bad: Client().log_batch(run_id(), metrics=[bad]),
        [3, "x", Metric("", 1.0, 0), Metric("k", "x", 0), Metric("k", 1.0, -1), Param("a", "b")],  # type: ignore[arg-type]
    ),
    "Client log_batch params": (
        lambda bad: Client().log_batch(run_id(), params=bad),
        [[3], [Param("", "x")], [Param("same", "a"), Param("same", "b")], [Param("k", "x" * 65_537)]],
    ),
    "Client log_batch tags": (lambda bad: Client().log_batch(run_id(), tags=bad), [[3], [RunTag("", "x")]]),
    "Client log_batch size": (
        lambda bad: Client().log_batch(run_id(), metrics=bad),
        [[Metric("k", 1.0, 0)] * (limits.MAX_BATCH_METRICS + 1)],
    ),
    "set_tracking_uri": (runstream.set_tracking_uri, ["ftp://x", "kafka://", "http://", "a\x00b", "  "]),
}


@pytest.mark.parametrize(
    ("name", "bad"),
    [pytest.param(name, bad, id=f"{name}: {str(bad)[:19]!a}") for name, (_, cases) in CALLS.items() for bad in cases],
)
def test_bad_input_is_a_clear_error(recorded: Recording, name: str, bad: Any) -> None:
    """It raises at the call, says something of use, stays short, and leaves the same run active."""
    before = runstream.active_run()
    with pytest.raises(InvalidInputError) as caught:
        CALLS[name][0](bad)
    message = str(caught.value)
    assert 10 < len(message) < 1000, message
    message.encode("ascii", "backslashreplace").decode()
    assert runstream.active_run() is before


def test_nothing_of_it_was_logged(recorded: Recording) -> None:
    """After all of the above the run holds nothing."""
    data = recorded.run(run_id()).data
    assert data.metrics == {}
    assert data.params == {}
    assert not {key for key in data.tags if not key.startswith(("mlflow.", "runstream."))}


@pytest.mark.parametrize("key", ["loss", "a/b.c-d:e f", "Übung", "日本語", "x" * 250, "val@k=1", "100%", "(a+b)*c"])
def test_unicode_and_punctuation_are_legal_keys(key: str) -> None:
    """Everything that MLflow takes, and more."""
    with recording() as recorded, runstream.start_run(nested=True) as run:
        runstream.log_metric(key, 1.0)
        runstream.log_metrics({key: 2.0}, step=1)
        runstream.log_param(key, "日本\n\t\x01 anything")
        runstream.set_tag(key, "")
    found = recorded.run(run.info.run_id)
    assert found.data.metrics == {key: 2.0}
    assert found.data.params == {key: "日本\n\t\x01 anything"}
    assert found.data.tags[key] == ""


def test_the_largest_legal_calls_arrive() -> None:
    """Values at their limits, and a dict of params that is larger than one event."""
    with recording() as recorded, runstream.start_run(nested=True) as run:
        runstream.log_params({f"p{i}": "ü" * 65_536 for i in range(30)})
        runstream.set_tag("t", "x" * 65_536)
        runstream.log_metrics({f"m{i}": float(i) for i in range(2000)})
        runstream.log_metric("edge", 1.0, limits.MAX_STEP, timestamp=0)
        runstream.log_metric("edge", 2.0, limits.MIN_STEP, timestamp=limits.MAX_TIME_MS - 1)
    found = recorded.run(run.info.run_id)
    assert len(found.data.params) == 30
    assert set(map(len, found.data.params.values())) == {65_536}
    assert len(found.data.metrics) == 2001
    assert [point.step for point in recorded.metric(run.info.run_id, "edge")] == [limits.MAX_STEP, limits.MIN_STEP]


def test_limits_are_named_with_a_remedy() -> None:
    """An error over a limit says which key, which limit and what to do."""
    with recording(), runstream.start_run(nested=True):
        with pytest.raises(InvalidInputError, match=r"'lr'.*65,537 characters.*limit is 65,536.*log_text"):
            runstream.log_param("lr", "x" * 65_537)
        with pytest.raises(InvalidInputError, match=r"10,001 params.*limit is 10,000.*several calls"):
            runstream.log_params({str(i): i for i in range(10_001)})
