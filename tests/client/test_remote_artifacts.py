"""Files through a server's artifact proxy: whole or not at all, errors that say why, and straight where possible."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runstream.config import Settings
from runstream.errors import ArtifactError, NotFoundError
from runstream.remote.artifacts import open_artifacts
from runstream.storage.retry import RetryPolicy
from runstream.storage.store import ArtifactStore
from runstream_query.server.delivery import ArtifactPlace, ServerDescription
from runstream_schemas.place import PROOF_FILE, make_proof, read_proof
from tests.services.delivery_server import delivery_server

NO_PAUSE = RetryPolicy(sleep=lambda seconds: None)


class Faults:
    """Between client and routes: refuses the next uploads, or breaks downloads off."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "PUT" and STATE.refusals:
            status = STATE.refusals.pop(0)
            await JSONResponse({"error_code": "X", "message": "said no"}, status_code=status)(scope, receive, send)
            return

        async def cut(message: Message) -> None:
            if STATE.cuts and message["type"] == "http.response.body" and message.get("body"):
                STATE.cuts -= 1
                await send({**message, "body": message["body"][:10], "more_body": True})
                raise ConnectionError("cut")
            await send(message)

        download = (
            scope["type"] == "http" and "/mlflow-artifacts/artifacts/" in scope["path"] and scope["method"] == "GET"
        )
        await self._app(scope, receive, cut if download else send)


@dataclass
class State:
    refusals: list[int]
    cuts: int


STATE = State([], 0)


@dataclass
class Place:
    url: str
    root: Path

    def store(self, **environment: str) -> ArtifactStore:
        settings = Settings.from_environment({"RUNSTREAM_DELIVERY": "server", **environment}, tracking_uri=self.url)
        return open_artifacts(settings, "mlflow-artifacts:/1/run/artifacts", NO_PAUSE)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    data = tmp_path_factory.mktemp("artifacts") / "data"
    root = data / "artifacts"
    root.mkdir(parents=True)
    described = ServerDescription(artifacts=ArtifactPlace(uri=root.as_uri(), proof=make_proof(root) or "", served=True))
    with delivery_server(data / "log", wrap=Faults, description=described) as url:
        yield Place(url, root)


@pytest.fixture
def place(shared: Place) -> Iterator[Place]:
    STATE.refusals, STATE.cuts = [], 0
    yield shared
    STATE.refusals, STATE.cuts = [], 0


@pytest.mark.parametrize("name", ["plain.bin", "deep/er/file", "ü #1 %20?&+.txt", "images/a#b+step+1.png"])
def test_what_goes_up_comes_back(place: Place, tmp_path: Path, name: str) -> None:
    """Any legal path, streamed both ways; size, listing and removal agree."""
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    store = place.store()
    done = store.put(tmp_path / "file", name)
    assert (place.root / "1/run/artifacts" / name).read_bytes() == content and done.size_bytes == len(content)
    assert store.size(name) == len(content) and store.size(name + "x") is None
    assert name in {info.path for info in store.walk("")}
    assert store.get(name, tmp_path / "back").digest == done.digest
    assert store.read(name) == content
    store.delete(name)
    assert store.size(name) is None
    with pytest.raises(NotFoundError):
        store.read(name)


def test_an_upload_that_breaks_off_leaves_nothing(place: Place) -> None:
    """The client fails in the middle: no file, and the same path can be written afterwards."""

    class Broken:
        sent = 0

        def read(self, size: int) -> bytes:
            self.sent += 1
            if self.sent > 3:
                raise ValueError("the disk of the client")
            return bytes(size)

    store = place.store()
    with pytest.raises(ValueError, match="disk of the client"):
        store._write(Broken(), "half", 50 << 20, None)  # type: ignore[arg-type]
    assert store.size("half") is None
    assert store.put_bytes(b"whole", "half").size_bytes == 5


@pytest.mark.parametrize("statuses", [[503], [429, 503, 500]])
def test_a_busy_server_is_tried_again(place: Place, statuses: list[int]) -> None:
    """Refusals of the moment end in a whole file."""
    STATE.refusals = list(statuses)
    assert place.store().put_bytes(b"x" * 100_000, "again").size_bytes == 100_000
    assert not STATE.refusals


@pytest.mark.parametrize(("status", "said"), [(401, "wants a login"), (403, "said no"), (413, "said no")])
def test_a_refusal_says_why_at_once(place: Place, status: int, said: str) -> None:
    """Also to an upload that is larger than what the connection holds: the answer is read, not the broken pipe."""
    STATE.refusals = [status] * 10
    with pytest.raises(Exception, match=said):
        place.store().put_bytes(bytes(30 << 20), "refused")
    assert len(STATE.refusals) == 9, "it is not tried again"


def test_a_download_that_breaks_off_is_no_short_file(place: Place, tmp_path: Path) -> None:
    """One cut is mended by another try; where every try is cut there is an error and no file."""
    store = place.store()
    store.put_bytes(b"0123456789" * 1000, "cut")
    STATE.cuts = 1
    assert store.get("cut", tmp_path / "mended").size_bytes == 10_000
    STATE.cuts = 100
    with pytest.raises(ArtifactError):
        store.get("cut", tmp_path / "never")
    assert not (tmp_path / "never").exists()
    STATE.cuts = 100
    with pytest.raises(ArtifactError):
        store.read("cut")


def test_straight_only_into_the_very_folder(place: Place) -> None:
    """With the server's word in it the folder is written to directly; with another word files go through the server."""
    settings = Settings.from_environment({}, tracking_uri=place.url)
    uri = f"{place.root.as_uri()}/1/run/artifacts"
    assert open_artifacts(settings, uri, NO_PAUSE).is_local
    from runstream.remote import artifacts

    artifacts._ways.clear()
    word = (place.root / PROOF_FILE).read_text()
    (place.root / PROOF_FILE).write_text("another")
    try:
        assert not open_artifacts(settings, uri, NO_PAUSE).is_local
    finally:
        (place.root / PROOF_FILE).write_text(word)
        artifacts._ways.clear()


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    """Uploads are loud, unlike metrics: the error says where and that trying again may help."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    settings = Settings.from_environment({}, tracking_uri=url)
    with pytest.raises(ArtifactError, match="cannot be reached") as caught:
        open_artifacts(settings, "mlflow-artifacts:/1/run/artifacts", NO_PAUSE)
    assert caught.value.retryable


def test_one_word_for_all_who_make_it_at_once(tmp_path: Path) -> None:
    """Servers that start together agree on the word of a folder."""
    words: list[str | None] = []
    crew = [threading.Thread(target=lambda: words.append(make_proof(tmp_path))) for _ in range(16)]
    for member in crew:
        member.start()
    for member in crew:
        member.join()
    assert len(words) == 16 and set(words) == {read_proof(tmp_path)} and words[0]
    assert [path.name for path in tmp_path.iterdir()] == [PROOF_FILE]
    assert make_proof(tmp_path / "nowhere") is None
