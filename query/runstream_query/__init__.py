"""Reading what was logged: searches, histories, SQL, over whichever store the settings name.

`open_reader(settings)` gives a `Reader`. Importing this package is cheap: the ClickHouse driver, the grammar, pandas
and pyarrow load when something first needs them.
"""

from __future__ import annotations

from .errors import (
    ExperimentNotFound,
    InvalidFilter,
    InvalidPageToken,
    InvalidQuery,
    QueryError,
    QueryTimeout,
    RunNotFound,
    SqlError,
    StoreBusy,
    StoreUnavailable,
)
from .frame import runs_to_dataframe
from .history import Bucket, Series
from .opening import open_reader
from .reader import Reader
from .store import Limits
from .visibility import Patience

__all__ = [
    "Bucket",
    "ExperimentNotFound",
    "InvalidFilter",
    "InvalidPageToken",
    "InvalidQuery",
    "Limits",
    "Patience",
    "QueryError",
    "QueryTimeout",
    "Reader",
    "RunNotFound",
    "Series",
    "SqlError",
    "StoreBusy",
    "StoreUnavailable",
    "open_reader",
    "runs_to_dataframe",
]
