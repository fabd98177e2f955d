"""Every limit on what may be logged, with its unit. Each is MLflow's or wider; both sides of the wire check these.

Lengths are characters of the Python string unless the name ends in `_bytes`.
"""

from __future__ import annotations

import re
from typing import Final

MAX_KEY_CHARS: Final = 250
"""Metric, param and tag keys (MLflow: 250)."""
MAX_PARAM_VALUE_CHARS: Final = 65_536
"""Param values (MLflow: 6,000)."""
MAX_TAG_VALUE_CHARS: Final = 65_536
"""Run tag values (MLflow: 8,000)."""
MAX_EXPERIMENT_TAG_VALUE_CHARS: Final = 65_536
"""Experiment tag values (MLflow: 20,000)."""
MAX_NAME_CHARS: Final = 500
"""Experiment and run names (MLflow: 500)."""
MAX_RUN_ID_CHARS: Final = 256
MAX_EXPERIMENT_ID_CHARS: Final = 64
MAX_ARTIFACT_PATH_CHARS: Final = 1_000
MAX_BATCH_METRICS: Final = 100_000
"""Metrics of one `log_batch` (MLflow: 1,000)."""
MAX_BATCH_PARAMS: Final = 10_000
"""Params of one `log_batch` (MLflow: 100)."""
MAX_BATCH_TAGS: Final = 10_000
"""Tags of one `log_batch` (MLflow: 100)."""
MAX_DATASET_NAME_CHARS: Final = 500
MAX_DATASET_DIGEST_CHARS: Final = 64
MAX_DATASET_TEXT_CHARS: Final = 1_000_000
"""Source, schema and profile of a data set, each."""
MAX_TIME_MS: Final = 9_214_646_400_000
"""Exclusive end of legal times: 2262-01-01 UTC, the end of ClickHouse's DateTime64(3) in nanosecond-safe range."""
MIN_STEP: Final = -(1 << 63)
MAX_STEP: Final = (1 << 63) - 1
METRIC_KEYS_WARNING: Final = 5_000
"""Distinct metric keys of one run above which the client warns once."""
MAX_BODY_BYTES: Final = 900_000
"""One event body. Producers split batches below it; it lies under Kafka's usual 1 MB and our topics' limit."""
MAX_MESSAGE_BYTES: Final = 1_048_576
"""`max.message.bytes` of our Kafka topics."""

HEARTBEAT_SECONDS: Final = 30.0
"""A client sends an explicit heartbeat after this long without any event of the run."""
LOST_AFTER_SECONDS: Final = 120
"""A RUNNING run whose last heartbeat is older than this is shown as LOST."""

RUN_ID_PATTERN: Final = re.compile(r"[a-zA-Z0-9][\w\-]{0,255}\Z", re.ASCII)
"""Legal run ids (MLflow's rule)."""
KEY_PATTERN: Final = re.compile(r"[\w\-. :/+*=@%#()\[\]<>|,&^~!$]+\Z")
"""Legal metric, param and tag keys: MLflow's characters (letters, digits, `_-. :/`) and more; no control characters."""
RUN_STATUSES: Final = ("RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED")
