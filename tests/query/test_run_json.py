"""Runs as the store writes them in MLflow's JSON: the same messages as those that are written in Python."""

from __future__ import annotations

import json
import math

import pytest
from pydantic_core import to_json

from runstream_query import Reader
from runstream_query.api.artifact_root import ArtifactRoot
from runstream_query.api.run_json import run_json
from runstream_query.api.run_rows import one_run, run_page
from runstream_query.run_records import MAX_RECORDS
from runstream_query.server.reading import StoreReading
from tests.query.logged import Logged

STRANGE = 'tab\t, line\n, quote ", \\ / and ünï\u2028 \x01'


@pytest.fixture(scope="module")
def ids(logged: Logged) -> list[str]:
    """Runs with every kind of fact, in active, deleted, restored and purged experiments."""
    found = []
    for number, name in enumerate(("plain", "deleted", "purged")):
        experiment = logged.experiment(name)
        early = logged.run(f"early{number}", experiment, name="early", metrics={"m": 1.0})
        if name == "deleted":
            logged.event("experiment_updated", experiment, experiment_id=experiment, lifecycle_stage="deleted")
        if name == "purged":
            logged.event("purged", experiment, kind="experiment", id=experiment)
        # A run that is started in a deleted experiment restores it; here its own deletion is newer.
        late = logged.run(f"late{number}", experiment, status="FAILED", ended_at=7, params={"p": STRANGE})
        logged.event("run_updated", late, run_id=late, lifecycle_stage="deleted")
        found += [early, late]
    plain = logged.experiment("plain")
    odd = logged.run("odd\trun\nid", plain, name=STRANGE, user=STRANGE, started_at=0, tags={"t": STRANGE, "é": ""})
    values = [math.inf, -math.inf, math.nan, -0.0, 5.0, 1e-7, 1e300, 0.1]
    for number, value in enumerate(values):
        logged.points(odd, f"metric {number}", [(number - 3, number, value), (-9, 5, 1.0)])
    logged.event("run_tags", odd, run_id=odd, keys=[], values=[], deleted_keys=["é"])
    ended = logged.run("ended", plain, status="FINISHED", ended_at=0)
    resumed = logged.run("resumed", plain, status="FINISHED", ended_at=9)
    logged.event("run_updated", resumed, run_id=resumed, status="RUNNING", ended_at=-1)
    for name, context, tags in (
        ("b", "train", {"kind": STRANGE}),
        ("a", "", {}),
        ("c", "x", {"mlflow.data.context": "own"}),
    ):
        logged.event(
            "input_logged", odd, run_id=odd, name=name, digest="d", source_type="s", source=STRANGE,
            schema="" if name == "a" else "{}", profile="" if name == "b" else "[]", context=context, tags=tags,
        )  # fmt: skip
    for direction in ("input", "output"):
        logged.event(
            "models_linked", odd, run_id=odd, direction=direction, model_ids=["m-2", "m-1"], steps=[2, 1]
        )  # fmt: skip
    logged.send()
    return [*found, odd, ended, resumed]


@pytest.mark.parametrize("served", [True, False])
def test_both_ways_write_the_same(reader: Reader, logged: Logged, ids: list[str], served: bool) -> None:
    """Whether a page is written in Python or by the store, its messages are the same and in the order asked for."""
    reading = StoreReading(reader)
    artifacts = ArtifactRoot(str(logged.root / "artifacts"), served)
    facts = reading.facts()
    wanted = [*reversed(ids), "nowhere"]
    in_python = [json.loads(each) for each in run_page(reading, artifacts, wanted, facts)]
    by_the_store = [json.loads(each) for each in run_json(reading, artifacts, wanted, facts)]
    assert by_the_store == in_python
    alone = [found for each in wanted if (found := one_run(reading, artifacts, each)) is not None]
    assert in_python == [json.loads(to_json(each, inf_nan_mode="strings")) for each in alone]
    present = [message["info"]["run_id"] for message in by_the_store]
    assert present == [each for each in wanted[:-1] if each != "early2"]
    odd = next(message for message in by_the_store if message["info"]["run_id"].startswith("odd"))
    assert odd["data"]["metrics"][2]["value"] == "NaN"
    assert odd["data"]["metrics"][0]["value"] == 1.7976931348623157e308
    assert odd["info"]["artifact_uri"].startswith("mlflow-artifacts:/" if served else "file:///")
    assert len(odd["inputs"]["dataset_inputs"]) == 3
    stages = {message["info"]["run_id"]: message["info"]["lifecycle_stage"] for message in by_the_store}
    assert stages["early1"] == "active" and stages["late1"] == "deleted"


def test_thousands_of_runs_in_one_page(reader: Reader, logged: Logged) -> None:
    """A page may have more runs than one statement can name."""
    experiment = logged.experiment("large")
    names = [f"{number:0250}" for number in range(1_000)]
    for name in names:
        logged.run(name, experiment, params={"number": name.lstrip("0")})
    logged.send()
    reading = StoreReading(reader)
    assert len(names) > MAX_RECORDS
    found, token, facts = reading.search_runs([experiment], "", 1, 50_000, ["run_id"], None)
    assert found == names and token is None
    page = [json.loads(each) for each in run_page(reading, ArtifactRoot("/x"), found, facts)]
    assert [each["info"]["run_id"] for each in page] == names
    assert [each["data"]["params"][0]["value"] for each in page] == [name.lstrip("0") for name in names]
