"""Artifacts of one run: moves files through `artifact_store` and says so in an event once they lie whole."""

from __future__ import annotations

import builtins
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from runstream_schemas import identity

from .addresses import PROXY_SCHEME
from .entities import FileInfo
from .errors import InvalidInputError, InvalidTypeError
from .events import EventWriter
from .storage.content import (
    dict_bytes,
    figure_bytes,
    image_bytes,
    parse_dict,
    table_bytes,
    table_of,
    text_bytes,
)
from .storage.path import artifact_path
from .storage.store import ArtifactStore, Uploaded, open_store
from .storage.transfer import ProgressCallback, download_tree, files_below, upload_files
from .validation import check_key, check_time_ms

__all__ = ["RunArtifacts", "download"]

_INTRODUCTION_SECONDS: Final = 10.0
"""How long the first upload of a run waits until a server knows of the run."""


class RunArtifacts:
    """Files of one run. Every upload blocks until it is complete; errors of storage are raised, as ArtifactError."""

    def __init__(self, writer: EventWriter, run_id: str, uri: str) -> None:
        self._writer, self._run_id = writer, run_id
        self.uri = uri
        """Full address, without a slash at the end."""
        self._recorded: dict[str, tuple[int, str]] = {}
        self._store: tuple[int, ArtifactStore] | None = None

    @property
    def store(self) -> ArtifactStore:
        """The store below `uri`, opened when first used in each process."""
        if self._store is None or self._store[0] != os.getpid():
            self._store = (os.getpid(), _opened(self._writer, self.uri))
        return self._store[1]

    def uri_of(self, path: object = None) -> str:
        """Full address of the artifact `path`, or of all of them."""
        clean = artifact_path(path, root_is_legal=True) if path is not None else ""
        return f"{self.uri}/{clean}" if clean else self.uri

    def log(self, local_path: object, folder: object = None, progress: ProgressCallback | None = None) -> None:
        """Upload a file, or a folder under its own name, into the artifact folder `folder`."""
        local = _local(local_path)
        prefix = _folder(folder)
        name = local.name or local.resolve().name
        if local.is_dir():
            self._upload([(file, f"{name}/{path}") for file, path in files_below(local)], prefix, progress)
        elif local.is_file():
            self._upload([(local, name)], prefix, progress)
        elif local.exists():
            raise InvalidInputError(f"{str(local)!r} is neither a file nor a folder, but a pipe, socket or device")
        else:
            raise InvalidInputError(f"there is no file or folder {str(local)!r}")

    def log_tree(
        self,
        local_folder: object,
        folder: object = None,
        progress: ProgressCallback | None = None,
        recorded: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        """Upload what a folder holds into the artifact folder `folder`, several files at once.

        Calling it again after a failure sends only what is missing or has changed.

        Args:
            recorded: artifact path -> (size in bytes, digest), of files that another process has logged.
        """
        local = _local(local_folder)
        if not local.is_dir():
            kind = "a file: use log_artifact" if local.exists() else "not there"
            raise InvalidInputError(f"log_artifacts takes a folder; {str(local)!r} is {kind}")
        self._recorded.update(recorded or {})
        self._upload(list(files_below(local)), _folder(folder), progress)

    def log_bytes(self, content: bytes, path: object) -> str:
        """Write `content` as the artifact `path`; its legal spelling."""
        clean = artifact_path(path, "artifact file")
        self._note(self.store.put_bytes(content, clean))
        return clean

    def log_text(self, text: object, path: object) -> None:
        """Write a text in UTF-8."""
        self.log_bytes(text_bytes(text), path)

    def log_dict(self, value: object, path: object) -> None:
        """Write a dict or list as JSON, or as YAML where the name ends in .yaml or .yml."""
        clean = artifact_path(path, "artifact file")
        self.log_bytes(dict_bytes(value, clean), clean)

    def log_figure(self, figure: Any, path: object, save_kwargs: Mapping[str, Any] | None = None) -> None:
        """Write a matplotlib or plotly figure in the format of the name's suffix."""
        clean = artifact_path(path, "artifact file")
        self.log_bytes(figure_bytes(figure, clean, save_kwargs), clean)

    def log_image(
        self,
        image: Any,
        path: object = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
    ) -> None:
        """Write a picture as the artifact `path`, or as one step of the picture series `key`."""
        if (path is None) == (key is None):
            raise InvalidInputError("log_image takes either an artifact file or key=")
        if key is not None:
            path = _image_path(check_key("image key", key), step, timestamp)
        elif step is not None or timestamp is not None:
            raise InvalidInputError("log_image takes step= and timestamp= only together with key=")
        clean = artifact_path(path, "artifact file")
        self.log_bytes(image_bytes(image, clean), clean)

    def log_table(self, data: Any, path: object) -> None:
        """Write a table as JSON; rows of a second call come behind those of the first."""
        clean = artifact_path(path, "artifact file")
        if not clean.endswith(".json"):
            raise InvalidInputError(f"log_table writes JSON: name the artifact file {clean!r} with .json at its end")
        table = table_of(data)
        earlier = self.store.read(clean) if self.store.size(clean) is not None else None
        self.log_bytes(table_bytes(table, earlier, clean), clean)

    def read_table(self, path: object) -> tuple[builtins.list[str], builtins.list[builtins.list[Any]]]:
        """Columns and rows of a table that `log_table` wrote."""
        clean = artifact_path(path, "artifact file")
        value = parse_dict(self.read(clean), clean)
        if not isinstance(value, dict) or not {"columns", "data"} <= value.keys():
            raise InvalidInputError(f"artifact {clean!r} is no table of log_table")
        return value["columns"], value["data"]

    def list(self, path: object = None) -> builtins.list[FileInfo]:
        """What lies directly below the folder `path`."""
        return self.store.list(artifact_path(path, root_is_legal=True) if path is not None else "")

    def read(self, path: object) -> bytes:
        """The content of one artifact."""
        return self.store.read(artifact_path(path))

    def download(self, path: object = "", folder: object = None, progress: ProgressCallback | None = None) -> str:
        """Download a file or tree; the local path of it, below `folder` or a new temporary folder."""
        return download(self.store, path, folder, progress)

    def _upload(self, files: builtins.list[tuple[Path, str]], prefix: str, progress: ProgressCallback | None) -> None:
        placed = [(file, artifact_path(f"{prefix}/{path}" if prefix else path)) for file, path in files]
        upload_files(self.store, placed, recorded=self._recorded, done=self._note, progress=progress)

    def _note(self, uploaded: Uploaded) -> None:
        self._writer.log_artifact(self._run_id, uploaded.path, uploaded.size_bytes, uploaded.digest)
        self._recorded[uploaded.path] = (uploaded.size_bytes, uploaded.digest)


def _opened(writer: EventWriter, uri: str) -> ArtifactStore:
    if writer.settings.scheme != "http":
        return open_store(uri)
    from .remote.artifacts import open_artifacts

    store = open_artifacts(writer.settings, uri)
    if uri.startswith(PROXY_SCHEME) and not store.is_local:
        # A server with permissions asks whose run it is: it must have heard of the run first.
        writer.recorder.flush(_INTRODUCTION_SECONDS)
    return store


def download(store: ArtifactStore, path: object, folder: object, progress: ProgressCallback | None) -> str:
    """Download what lies at `path` below `folder`, or below a new temporary folder; the local path of it."""
    clean = artifact_path(path if path is not None else "", root_is_legal=True)
    import tempfile

    target = Path(tempfile.mkdtemp(prefix="runstream-")) if folder is None else _local(folder)
    if target.exists() and not target.is_dir():
        raise InvalidInputError(f"cannot download into {str(target)!r}: it is a file, not a folder")
    return str(download_tree(store, clean, target, progress=progress))


def _image_path(key: str, step: int | None, timestamp: int | None) -> str:
    """MLflow's naming of picture series: what stands between the + can be read back."""
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise InvalidTypeError(f"step must be an int, not {type(step).__name__}")
    moment = identity.now_ms() if timestamp is None else check_time_ms("timestamp", timestamp)
    name = re.sub(r"[^\w\-. #]", "~", key.replace("/", "#"))
    return f"images/{name}+step+{step or 0}+timestamp+{moment}+{os.urandom(4).hex()}.png"


def _local(path: object) -> Path:
    if isinstance(path, str | os.PathLike):
        text: Any = os.fspath(path)
        if isinstance(text, str):
            if not text or "\0" in text:
                raise InvalidInputError(f"local path {text!r} is empty or has a NUL character")
            return Path(text).expanduser()
    raise InvalidTypeError(f"local path must be a str or a path, not {type(path).__name__}")


def _folder(folder: object) -> str:
    return "" if folder is None else artifact_path(folder, root_is_legal=True)
