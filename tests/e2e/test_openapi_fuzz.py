"""Every route, fuzzed from the server's own OpenAPI description: with authentication and without it.

Seeded and bounded: the same requests each time. Half of the ids in them are those of a run, an experiment and a model
that exist, so that handlers are reached behind their first look-up.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure, Unsatisfiable

pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")
pytest.importorskip("schemathesis", reason="needs pip install 'runstream[dev]'")


import schemathesis
from schemathesis.specs.openapi import checks

from runstream_query.server.auth import AuthFile
from tests.e2e.mlflow_server import Served, served

EXAMPLES = {"open": 6, "authenticated": 2, "limited": 4}
"""Requests per operation and way of making them (fitting the description, and not)."""
SLOW_SECONDS = 30.0
API = "/api/2.0/mlflow"


@schemathesis.serializer("application/vnd.runstream.events")
def posted_events(_: Any, value: Any) -> bytes:
    """Events are binary: what is generated for them goes out as it is."""
    if isinstance(value, bytes):
        return value
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else json.dumps(value, default=str).encode()


@dataclass
class Target:
    server: Served
    headers: dict[str, str]
    examples: int
    ids: dict[str, str] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    """Answers that were wrong, with their requests."""

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **self.headers}
        with urllib.request.urlopen(urllib.request.Request(self.server.url + path, data, headers)) as answer:
            return json.load(answer)


@pytest.fixture(scope="module", params=["open", "authenticated", "limited"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    arguments = ["--no-access-log"]
    headers = {}
    if request.param != "open":
        file = folder / "auth.json"
        token = AuthFile.change(file, lambda content: content.add_token("fuzz", "write"))[1]
        arguments += ["--auth-file", str(file), "--audit-file", str(folder / "audit")]
        headers = {"Authorization": f"Bearer {token}"}
    with served(folder / "data", arguments) as server:
        found = Target(server, headers, EXAMPLES[request.param])
        experiment = found.ask(f"{API}/experiments/create", {"name": "fuzzed"})["experiment_id"]
        run = found.ask(f"{API}/runs/create", {"experiment_id": experiment, "start_time": 1})["run"]["info"]["run_id"]
        model = found.ask(f"{API}/logged-models", {"experiment_id": experiment, "name": "m"})["model"]["info"]
        found.ids = {"experiment_id": experiment, "run_id": run, "run_uuid": run, "model_id": model["model_id"]}
        found.ids |= {"path": f"{experiment}/{run}/artifacts/f", "experiment_name": "fuzzed"}
        if request.param == "limited":
            AuthFile.change(file, lambda content: content.grant("fuzz", "none", None))
            AuthFile.change(file, lambda content: content.grant("fuzz", "edit", experiment))
        yield found
        # The whole storm on one server: nothing failed inside, and it still answers.
        assert found.ask(f"{API}/runs/get?run_id={run}")["run"]["info"]["run_id"] == run
        said = "".join(server.lines)
        assert "Traceback" not in said, said[said.index("Traceback") - 200 :][:4_000]
        assert found.statuses[200] > 20 and found.statuses[400] > 20


def known(values: Any, ids: Mapping[str, str]) -> Any:
    """`values` with the ids in it replaced by ones that exist."""
    if not isinstance(values, dict):
        return values
    fixed = {}
    for name, value in values.items():
        if name in ids:
            fixed[name] = ids[name]
        elif name.endswith("_ids") and name[:-1] in ids:
            fixed[name] = [ids[name[:-1]]]
        else:
            fixed[name] = value
    return fixed


def ask(target: Target, case: Any) -> None:
    """Send one request; what is wrong about the answer is an AssertionError or schemathesis's failures."""
    response = case.call(
        base_url=target.server.url, headers=target.headers, timeout=SLOW_SECONDS, allow_redirects=False
    )
    target.statuses[response.status_code] += 1
    documented = response.status_code in (501, 503) or (
        response.status_code == 500 and "x-clickhouse-exception-code" in response.headers
    )
    assert response.status_code < 500 or documented, response.text[:500]
    assert response.headers["x-content-type-options"] == ["nosniff"] and response.headers["x-request-id"]
    case.validate_response(
        response,
        checks=[checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance],
    )


def fuzz(target: Target, operation: Any, mode: Any) -> int:
    """Ask so many times; failures go to `target`. The number of requests sent."""
    asked = 0

    @seed(20_260_131)
    @settings(
        max_examples=target.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), real=st.booleans())
    def run(case: Any, real: bool) -> None:
        nonlocal asked
        if real:
            case.body = known(case.body, target.ids)
            for place in ("query", "path_parameters"):
                if getattr(case, place):
                    setattr(case, place, known(getattr(case, place), target.ids))
        asked += 1
        # Kept, not raised: hypothesis would repeat the request on a server that has moved on, and call it flaky.
        try:
            ask(target, case)
        except Exception as exc:
            causes = "".join(f"\n    {cause!r}" for cause in getattr(exc, "exceptions", ()))
            target.failures.append(f"{operation.label}, {mode.value}: {exc!r}{causes}\n    {case.as_curl_command()}")

    try:
        run()
    except Unsatisfiable:
        assert mode is schemathesis.GenerationMode.NEGATIVE  # nothing about this operation could be wrong
    except FlakyFailure as exc:
        # No answer raises here, so it was the making of a request; rarely, and not reproducibly, that fails.
        print(f"{operation.label}, {mode.value}: no request could be made: {exc!r} {exc.exceptions!r}")
    return asked


# Kafka clients in other threads of this process may draw a pause meanwhile, which hypothesis takes for our strategies.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.timeout(600)
def test_every_operation_answers_as_described(target):
    """No failure, no hang, and each answer as its description says, for requests that fit it and that do not."""
    with urllib.request.urlopen(
        urllib.request.Request(target.server.url + "/openapi.json", headers=target.headers)
    ) as answer:
        description = json.load(answer)
    schema = schemathesis.openapi.from_dict(description)
    count = 0
    began = time.monotonic()
    for found in schema.get_all_operations():
        operation = found.ok()
        modes = [schemathesis.GenerationMode.POSITIVE]
        if not operation.path.endswith(("/login", "/logout", "/events")):  # nothing about their bodies can be wrong
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        asked = sum(fuzz(target, operation, mode) for mode in modes)
        assert asked, operation.label
        print(f"{time.monotonic() - began:6.1f} s  {asked:3d}  {operation.label}", flush=True)
        count += 1
    assert not target.failures, "\n\n".join(target.failures)
    assert count > 55
