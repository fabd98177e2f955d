"""Signed addresses of object storage: uploads in parts and downloads that others make without credentials.

S3 only, through s3fs. Everything blocks and leaves as the errors of `store`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import ArtifactError, NotFoundError
from .path import artifact_path
from .retry import is_transient
from .store import ArtifactStore

__all__ = ["SignedStore", "signed_store"]

T = TypeVar("T")


def signed_store(store: ArtifactStore) -> SignedStore | None:
    """Signing for `store`; None where its storage cannot."""
    protocol = getattr(store.filesystem, "protocol", ())
    names = (protocol,) if isinstance(protocol, str) else protocol
    return SignedStore(store) if "s3" in names else None


@dataclass(frozen=True, slots=True)
class SignedStore:
    """Addresses below the root of one store; who holds one may use it until it expires."""

    store: ArtifactStore

    def begin(self, path: str, parts: int, seconds: int) -> tuple[str, list[str]]:
        """Begin an upload of `path`: its id, and one address to PUT each part to, valid for `seconds`."""

        def begin(filesystem: Any, bucket: str, key: str) -> tuple[str, list[str]]:
            upload_id = str(filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"])
            urls = [
                filesystem.url(
                    f"{bucket}/{key}",
                    expires=seconds,
                    client_method="upload_part",
                    PartNumber=number,
                    UploadId=upload_id,
                )
                for number in range(1, parts + 1)
            ]
            return upload_id, urls

        return self._at(path, begin)

    def complete(self, path: str, upload_id: str, parts: Sequence[tuple[int, str]]) -> int:
        """Join the (number, etag) parts; the file's size in bytes.

        Raises:
            NotFoundError: there is no such upload.
        """
        done = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(parts)]

        def complete(filesystem: Any, bucket: str, key: str) -> None:
            filesystem.call_s3(
                "complete_multipart_upload",
                Bucket=bucket,
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": done},
            )

        self._at(path, complete)
        size = self.store.size(path)
        if size is None:
            raise ArtifactError(f"artifact {path!r}: the parts were joined, but no file lies at {self.store.uri}")
        return size

    def abort(self, path: str, upload_id: str) -> None:
        """Throw the parts away; an upload that is gone is no error."""

        def abort(filesystem: Any, bucket: str, key: str) -> None:
            filesystem.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)

        try:
            self._at(path, abort)
        except NotFoundError:
            return

    def upload_url(self, path: str, seconds: int) -> str:
        """An address to PUT the whole file to."""

        def sign(filesystem: Any, bucket: str, key: str) -> str:
            return str(filesystem.url(f"{bucket}/{key}", expires=seconds, client_method="put_object"))

        return self._at(path, sign)

    def download_url(self, path: str, disposition: str, seconds: int) -> tuple[str, int] | None:
        """An address to GET the file from with the Content-Disposition `disposition`, and its size; None: no file."""
        size = self.store.size(path)
        if size is None:
            return None

        def sign(filesystem: Any, bucket: str, key: str) -> str:
            return str(filesystem.url(f"{bucket}/{key}", expires=seconds, ResponseContentDisposition=disposition))

        return self._at(path, sign), size

    def _at(self, path: str, action: Callable[[Any, str, str], T]) -> T:
        place = f"{self.store.root}/{artifact_path(path)}"
        bucket, _, key = place.partition("/")
        what = f"signing for {path!r} at {self.store.uri}"
        try:
            return action(self.store.filesystem, bucket, key)
        except FileNotFoundError as exc:
            raise NotFoundError(f"{what} failed: there is no such upload, file or bucket") from exc
        except Exception as exc:
            raise ArtifactError(f"{what} failed: {type(exc).__name__}: {exc}", retryable=is_transient(exc)) from exc
