"""What one invocation of the command works with: its output, the tracking address, and runs and experiments by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from runstream_schemas.layout import DataDirectory, ServerAddress

from .failure import ExitCode, Failure
from .output import Output

if TYPE_CHECKING:
    import pyarrow

    from ..client import Client
    from ..config import Settings
    from ..entities import Experiment, Run
    from ..events import EventWriter

__all__ = ["Session", "local_store_pid"]

FLUSH_SECONDS: Final = 30.0
"""How long a changing command waits for the log to take its events."""


class Session:
    """One invocation. Everything heavy is imported at first use."""

    def __init__(self) -> None:
        self.output = Output()
        self.tracking_uri: str | None = None
        """Of --tracking-uri; None: the environment's or the default."""
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The client for explicit run ids, connected at its first read."""
        if self._client is None:
            from ..client import Client

            self._client = Client(self.tracking_uri)
        return self._client

    @property
    def settings(self) -> Settings:
        """The settings for --tracking-uri, or the environment's."""
        from ..config import Settings

        return Settings.from_environment(tracking_uri=self.tracking_uri)

    def sql(self, query: str, **parameters: Any) -> list[dict[str, Any]]:
        """Rows of `query` over the public views, as dicts."""
        rows: list[dict[str, Any]] = self.client.sql(query, parameters, "rows")
        return rows

    def arrow(self, query: str, parameters: Mapping[str, Any]) -> pyarrow.Table:
        """The answer to `query` as an Arrow table."""
        table: pyarrow.Table = self.client.sql(query, parameters, "arrow")
        return table

    def run_id(self, text: str) -> str:
        """The full id of the run that `text` names: an id, the unambiguous beginning of one, or a unique run name.

        Raises:
            Failure: there is none, or there are several.
        """
        found = self.sql(
            "SELECT run_id, name, experiment_name FROM runs "
            "WHERE startsWith(run_id, {text:String}) OR name = {text:String} "
            "ORDER BY run_id = {text:String} DESC, started_at DESC LIMIT 6",
            text=text,
        )
        exact = [row for row in found if row["run_id"] == text]
        chosen = exact or found
        if not chosen:
            raise Failure(f"no run {text!r}; `runstream runs list` shows the newest", ExitCode.NOT_FOUND)
        if len(chosen) > 1:
            matches = ", ".join(f"{row['run_id'][:20]} ({row['name']})" for row in chosen[:5])
            more = ", ..." if len(chosen) > 5 else ""
            raise Failure(
                f"{text!r} names several runs: {matches}{more}; give more characters of the id",
                ExitCode.USAGE,
            )
        return str(chosen[0]["run_id"])

    def run(self, text: str) -> Run:
        """The run that `text` names; see `run_id`."""
        return self.client.get_run(self.run_id(text))

    def experiment(self, text: str) -> Experiment:
        """The experiment with the name or id `text`, deleted ones included.

        Raises:
            Failure: there is none.
        """
        found = self.client.get_experiment_by_name(text)
        if found is None and text.isdecimal():
            from ..errors import NotFoundError

            with suppress(NotFoundError):
                found = self.client.get_experiment(text)
        if found is None:
            raise Failure(f"no experiment {text!r}; `runstream experiments list` shows them", ExitCode.NOT_FOUND)
        return found

    def experiment_ids(self, names: tuple[str, ...], *, include_deleted: bool = False) -> list[str]:
        """Ids of the experiments called `names`; of all where `names` is empty."""
        if names:
            return [self.experiment(name).experiment_id for name in names]
        condition = "" if include_deleted else " WHERE lifecycle_stage = 'active'"
        rows = self.sql(f"SELECT experiment_id FROM experiments{condition}")
        return [str(row["experiment_id"]) for row in rows]

    def writer(self) -> EventWriter:
        """Writes events that no client call makes; use it inside `writing`."""
        from ..events import writer_for

        return writer_for(self.settings)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around calls that change something: returns once every event of them is in the log.

        Raises:
            Failure: the log did not take them in time; they are kept in the journal.
        """
        yield
        report = self.client.flush(FLUSH_SECONDS)
        if not report:
            why = f" ({report.last_error})" if report.last_error else ""
            raise Failure(
                f"the change is kept in the journal, the log did not take it yet{why}; `runstream sync` delivers it",
                ExitCode.UNAVAILABLE,
            )

    def complete_runs(self, incomplete: str) -> list[tuple[str, str]]:
        """Ids that begin with `incomplete` and the names of their runs; nothing where asking would start a store."""
        query = (
            "SELECT run_id, name FROM runs WHERE startsWith(run_id, {text:String}) AND lifecycle_stage = 'active' "
            "ORDER BY started_at DESC LIMIT 30"
        )
        return [(row["run_id"], row["name"]) for row in self._quick(query, incomplete)]

    def complete_experiments(self, incomplete: str) -> list[str]:
        """Names that begin with `incomplete`; nothing where asking would start a store."""
        query = "SELECT name FROM experiments WHERE startsWith(name, {text:String}) ORDER BY name LIMIT 30"
        return [row["name"] for row in self._quick(query, incomplete)]

    def _quick(self, query: str, incomplete: str) -> list[dict[str, Any]]:
        """Rows for the shell's completion: it must be quick and never speak, so any trouble means no rows."""
        try:
            return self.sql(query, text=incomplete) if self._is_warm() else []
        except Exception:
            return []

    def _is_warm(self) -> bool:
        """Whether a store answers without being started: one on a server, or a live local store process."""
        directory = self.settings.data_directory
        return directory is None or local_store_pid(directory) is not None


def local_store_pid(directory: DataDirectory) -> int | None:
    """Process id of the live local store process of `directory`, or None. Starts and changes nothing."""
    import fcntl

    try:
        with directory.lock.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        address = ServerAddress.read(directory.server_file)
        return address.pid if address is not None else None
    except OSError:
        return None
