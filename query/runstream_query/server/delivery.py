"""Our own clients' door: where log and artifacts are, posted events, the log's end, the size of an artifact.

An event's stream and partition follow from its schema, never from the sender; its key must be the id inside its body.
Control events are decoded here; metric batches are not (ingest refuses a damaged one by itself), but for their run id.
All of a request is appended or none of it: where an event can never be taken, the answer is 422 and names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from runstream.errors import ArtifactError, InvalidInputError
from runstream.transport import Event, Positions
from runstream_query.api.artifact_root import clean_path
from runstream_query.api.artifacts import artifact_store
from runstream_query.api.backend import Backend
from runstream_query.api.errors import ApiError, invalid
from runstream_query.api.wire import JsonResponse
from runstream_schemas import codec
from runstream_schemas.delivery import (
    ARTIFACT_PATH,
    CONTENT_TYPE,
    ENCODINGS,
    EVENTS_PATH,
    MAX_REQUEST_BYTES,
    MAX_REQUEST_EVENTS,
    POSITIONS_PATH,
    SERVER_PATH,
    DeliveryError,
    decompress,
)
from runstream_schemas.limits import MAX_BODY_BYTES, MAX_RUN_ID_CHARS
from runstream_schemas.names import FIRST_PARTITION_EVENTS, STREAM_OF, EventName
from runstream_schemas.segment import Frame, whole_frames

from .problems import answer

MAX_HELD_BYTES: Final = 128 * 1024 * 1024
"""Posted bytes in memory over all requests; beyond it the answer is 429 at once."""
_AT_ONCE_BYTES: Final = 64 * 1024
"""Smaller bodies are read on the event loop: a thread's hand-over would cost more."""
_IDS: Final = ("run_id", "experiment_id", "id", "model_id")
_FORBIDDEN: Final = "this needs the role admin"


class LogPlace(BaseModel):
    """Where the server appends."""

    uri: str = ""
    """kafka://host:port/PREFIX, or the data directory as file:///...; never with credentials."""
    proof: str = ""
    """Word in the data directory by which a client knows that it sees the same one."""


class ArtifactPlace(BaseModel):
    """Where the server's artifacts lie."""

    uri: str = ""
    proof: str = ""
    served: bool = False
    """Whether the artifact proxy answers."""


class SqlPlace(BaseModel):
    """The SQL port, on the server's own address."""

    database: str = ""
    """Empty: SQL is not offered."""


class DeliveryLimits(BaseModel):
    """What one request of events may hold."""

    max_request_bytes: int = MAX_REQUEST_BYTES
    """Before compression."""
    max_request_events: int = MAX_REQUEST_EVENTS
    encodings: list[str] = list(ENCODINGS)


class ServerDescription(BaseModel):
    """What a client of ours must know: addresses, never credentials."""

    version: str = ""
    authentication: bool = False
    host: str = ""
    """Mark of the server's machine: equal under one kernel."""
    log: LogPlace = LogPlace()
    artifacts: ArtifactPlace = ArtifactPlace()
    sql: SqlPlace = SqlPlace()
    delivery: DeliveryLimits = DeliveryLimits()


class Position(BaseModel):
    """An end of the log."""

    stream: str
    partition: int
    next_offset: int


class Ends(BaseModel):
    """Positions: behind what was appended, or where the log ends."""

    positions: list[Position]


class ArtifactSize(BaseModel):
    """One file below the artifact root."""

    size_bytes: int | None
    """None: there is no such file."""


class RefusedEventError(ValueError):
    """An event that can never be appended."""


@dataclass(slots=True)
class Touched:
    """Whose remembered state events change."""

    runs: set[str] = field(default_factory=set)
    experiments: set[str] = field(default_factory=set)
    lifecycles: set[str] = field(default_factory=set)
    """Experiments whose runs may have been deleted or restored with them."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One event, ready to append."""

    event: Event
    name: EventName
    fields: dict[str, Any]
    """Decoded; empty for metric batches."""

    def touch(self, touched: Touched) -> None:
        """Note what must be read anew."""
        fields = self.fields
        if self.name == "purged":
            (touched.runs if fields.get("kind") == "run" else touched.lifecycles).add(str(fields.get("id")))
        elif self.name in ("experiment_created", "experiment_updated", "experiment_tags"):
            touched.experiments.add(fields["experiment_id"])
            if self.name == "experiment_updated":
                touched.lifecycles.add(fields["experiment_id"])
        elif self.name != "metric_batch":
            if fields.get("run_id"):
                touched.runs.add(fields["run_id"])
            if self.name == "run_started":  # it restores a deleted experiment
                touched.lifecycles.add(fields["experiment_id"])


Check = Callable[[Frame], Checked]


class Guard(Protocol):
    """Who may do what; see `permission`. Each method raises ApiError, 403 above all, where the caller may not."""

    async def append(self, request: Request, events: Sequence[Event]) -> None:
        """Before these events are appended."""
        ...

    async def read_artifact(self, request: Request, path: str) -> None:
        """Before something about the file at `path` (clean) is told."""
        ...

    def appended(self, request: Request, events: Sequence[Checked]) -> None:
        """After these events were appended; raises nothing."""
        ...


class _Open:
    """Everybody may do everything."""

    async def append(self, request: Request, events: Sequence[Event]) -> None:
        return

    async def read_artifact(self, request: Request, path: str) -> None:
        return

    def appended(self, request: Request, events: Sequence[Checked]) -> None:
        return


def checked(frame: Frame) -> Checked:
    """The event in `frame`.

    Raises:
        RefusedEventError: an unknown schema, a wrong size or key, or a body that does not decode.
    """
    schema = codec.schemas().get(frame.fingerprint)
    if schema is None:
        raise RefusedEventError(f"unknown schema {frame.fingerprint.hex()}: this server is older than its client")
    if len(frame.body) > MAX_BODY_BYTES:
        raise RefusedEventError(f"{len(frame.body)} bytes are above the limit of {MAX_BODY_BYTES}")
    if not frame.key or len(frame.key) > MAX_RUN_ID_CHARS:
        raise RefusedEventError(f"a key of {len(frame.key)} characters; give 1 to {MAX_RUN_ID_CHARS}")
    fields: dict[str, Any] = {}
    if schema.event == "metric_batch":
        if not frame.body.startswith(_avro_string(frame.key)):
            raise RefusedEventError("the key of a metric batch is not its run id")
    else:
        try:
            _, fields = codec.decode(frame.fingerprint, frame.body)
        except codec.CodecError as exc:
            raise RefusedEventError(str(exc)) from exc
        if all(fields.get(name) != frame.key for name in _IDS):
            raise RefusedEventError(f"the key of a {schema.event} event is not the id in it")
    event = Event(
        STREAM_OF[schema.event], frame.key, frame.fingerprint, frame.body, schema.event in FIRST_PARTITION_EVENTS
    )
    return Checked(event, schema.event, fields)


def _avro_string(text: str) -> bytes:
    """`text` as Avro writes it: length in bytes (zigzag varint), then UTF-8."""
    data = text.encode("utf-8", "surrogatepass")
    size, head = len(data) << 1, bytearray()
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + data


class Delivery:
    """The routes, bound to one server process."""

    def __init__(
        self,
        backend: Callable[[], Backend],
        describe: Callable[[], ServerDescription],
        ends: Callable[[], Positions],
        guard: Guard | None = None,
        check: Check = checked,
    ) -> None:
        """
        Args:
            ends: where the log ends now; blocks.
        """
        self._backend = backend
        self._describe = describe
        self._ends = ends
        self._guard: Guard = guard or _Open()
        self._check = check
        self._held_bytes = 0
        self.router = APIRouter(tags=["runstream"])
        add = self.router.add_api_route
        add(SERVER_PATH, self.server, response_model=ServerDescription, methods=["GET"])
        add(POSITIONS_PATH, self.positions, response_model=Ends, methods=["GET"])
        add(ARTIFACT_PATH, self.artifact, response_model=ArtifactSize, methods=["GET"])
        add(
            EVENTS_PATH,
            self.events,
            response_model=Ends,
            methods=["POST"],
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}}},
                }
            },
        )

    async def server(self) -> Response:
        """Where log, artifacts and SQL are."""
        try:
            return JsonResponse((await run_in_threadpool(self._describe)).model_dump())
        except Exception as exc:
            return answer(exc)

    async def positions(self) -> Response:
        """Where the log ends, over all writers."""
        try:
            return _positions(await run_in_threadpool(self._ends))
        except Exception as exc:
            return answer(exc)

    async def artifact(self, request: Request, path: str = "") -> Response:
        """The size of one file below the artifact root."""
        try:
            store = artifact_store(self._backend())
            clean = clean_path(path, number_sign=True)
            await self._guard.read_artifact(request, clean)
            size = await run_in_threadpool(store.size, clean) if clean else None
            return JsonResponse({"size_bytes": size})
        except ArtifactError as exc:
            return answer(ApiError("TEMPORARILY_UNAVAILABLE", str(exc), retry_after_seconds=1))
        except InvalidInputError as exc:
            return answer(invalid(f"Invalid path: {exc}"))
        except Exception as exc:
            return answer(exc)

    async def events(self, request: Request) -> Response:
        """Append events; answers once they are durable in the log."""
        held = [0]
        try:
            raw = await self._body(request, held)
            encoding = request.headers.get("content-encoding", "").strip().lower()
            if len(raw) <= _AT_ONCE_BYTES and encoding in ("", "identity"):
                found, refused = self._read(raw, encoding)
            else:
                found, refused = await run_in_threadpool(self._read, raw, encoding)
            del raw
            events = [item for item in found if item is not None]
            refused = refused or await self._forbidden(request, events)
            if refused:
                return _refusal(refused)
            backend = self._backend()
            positions = await backend.append([item.event for item in events])
            self._forget(backend, events)
            self._guard.appended(request, events)
            return _positions(positions)
        except Exception as exc:
            return answer(exc)
        finally:
            self._held_bytes -= held[0]

    async def _body(self, request: Request, held: list[int]) -> bytes:
        declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if declared != CONTENT_TYPE:
            raise ApiError("INVALID_PARAMETER_VALUE", f"Content-Type must be {CONTENT_TYPE}.", status=415)
        parts: list[bytes] = []
        size = 0
        try:
            async for part in request.stream():
                size += len(part)
                if size > MAX_REQUEST_BYTES:
                    raise _too_large(f"The body is larger than {MAX_REQUEST_BYTES} bytes; send fewer events.")
                if self._held_bytes + len(part) > MAX_HELD_BYTES:
                    raise ApiError(
                        "REQUEST_LIMIT_EXCEEDED", "Too many events are on their way; try again.", retry_after_seconds=1
                    )
                self._held_bytes += len(part)
                held[0] += len(part)
                parts.append(part)
        except ClientDisconnect as exc:
            raise invalid("The client left before its request was complete.") from exc
        return b"".join(parts)

    def _read(self, raw: bytes, encoding: str) -> tuple[list[Checked | None], dict[int, str]]:
        """The events of a body, None for each refused one; and why, by index."""
        try:
            data = decompress(raw, encoding)
        except DeliveryError as exc:
            raise (_too_large(str(exc)) if exc.too_large else invalid(str(exc))) from exc
        found: list[Checked | None] = []
        refused: dict[int, str] = {}
        for item in whole_frames(data):
            if not isinstance(item, Frame):
                raise invalid(f"The body holds no whole frame at byte {item.offset}: it was damaged on its way.")
            if len(found) >= MAX_REQUEST_EVENTS:
                raise _too_large(f"The body holds more than {MAX_REQUEST_EVENTS} events; send fewer.")
            try:
                found.append(self._check(item))
            except RefusedEventError as exc:
                refused[len(found)] = str(exc)
                found.append(None)
        return found, refused

    async def _forbidden(self, request: Request, found: Sequence[Checked]) -> dict[int, str]:
        """Events that this caller may not append, by index."""
        principal = request.scope.get("runstream_principal")
        refused = {}
        if principal is not None and not principal.may("admin"):
            refused = {index: _FORBIDDEN for index, item in enumerate(found) if item.name == "purged"}
        if refused:
            return refused
        events = [item.event for item in found]
        try:
            await self._guard.append(request, events)
        except ApiError as exc:
            if exc.status not in (400, 403, 404):
                raise
            if len(events) == 1:
                return {0: exc.message}
            # Which of them it is shows when they come one by one.
            return dict.fromkeys(range(len(events)), exc.message)
        return {}

    @staticmethod
    def _forget(backend: Backend, found: Sequence[Checked]) -> None:
        touched = Touched()
        for item in found:
            item.touch(touched)
        for run_id in touched.runs:
            backend.forget_run(run_id)
        for experiment_id in touched.experiments | touched.lifecycles:
            backend.forget_experiment(experiment_id)
        for experiment_id in touched.lifecycles:
            backend.forget_runs_of(experiment_id)


def _positions(positions: Positions) -> Response:
    return JsonResponse(
        {
            "positions": [
                {"stream": stream, "partition": partition, "next_offset": offset}
                for (stream, partition), offset in sorted(positions.items())
            ]
        }
    )


def _refusal(refused: dict[int, str]) -> Response:
    first = min(refused)
    return JsonResponse(
        {
            "error_code": "INVALID_PARAMETER_VALUE",
            "message": f"{len(refused)} of the events can never be taken, so none was; the first: {refused[first]}",
            "refused": [{"index": index, "reason": reason} for index, reason in sorted(refused.items())],
        },
        status_code=422,
    )


def _too_large(message: str) -> ApiError:
    return ApiError("INVALID_PARAMETER_VALUE", message, status=413)
