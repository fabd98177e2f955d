-- Private tables behind the public views. Every engine is idempotent: the same rows in any order and any batching,
-- once or many times, give the same content after a FINAL read. Versions are UInt128 (see identity.Version).

-- run_id is LowCardinality where there are many rows a run: sorting on insert costs a third less, merging a tenth.
CREATE TABLE IF NOT EXISTS points
(
    run_id LowCardinality(String) CODEC(ZSTD(1)),
    key LowCardinality(String) CODEC(ZSTD(1)),
    step Int64 CODEC(DoubleDelta, ZSTD(1)),
    timestamp DateTime64(3, 'UTC') CODEC(Delta, ZSTD(1)),
    value Float64 CODEC(ZSTD(1)),
    writer Int64 CODEC(ZSTD(1)),
    seq Int64 CODEC(DoubleDelta, ZSTD(1)),
    log_partition Int32 CODEC(ZSTD(1)),
    log_offset Int64 CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree
PRIMARY KEY (run_id, key, step)
ORDER BY (run_id, key, step, timestamp, writer, seq);

-- Small granules, here and below: a page of runs reads a few rows at each of 50 places.
-- One row per series. last is the largest (step, timestamp, value without NaN, is NaN).
CREATE TABLE IF NOT EXISTS rollup
(
    run_id LowCardinality(String) CODEC(ZSTD(1)),
    key LowCardinality(String) CODEC(ZSTD(1)),
    last SimpleAggregateFunction(max, Tuple(step Int64, timestamp DateTime64(3, 'UTC'), value Float64, is_nan UInt8)),
    min SimpleAggregateFunction(min, Float64),
    max SimpleAggregateFunction(max, Float64)
)
ENGINE = AggregatingMergeTree
ORDER BY (run_id, key)
SETTINGS index_granularity = 1024;

-- One row per run. start holds the smallest version (kept as its complement, so that max keeps it and 0 is "none").
CREATE TABLE IF NOT EXISTS run_facts
(
    run_id String CODEC(ZSTD(1)),
    start SimpleAggregateFunction(max, Tuple(inverse_version UInt128, experiment_id String, name String, user String,
        source_name String, source_type String, source_version String, artifact_uri String, parent_run_id String,
        started_at Int64)),
    status SimpleAggregateFunction(max, Tuple(version UInt128, status String, ended_at Int64)),
    name SimpleAggregateFunction(max, Tuple(version UInt128, name String)),
    lifecycle SimpleAggregateFunction(max, Tuple(version UInt128, stage String)),
    heartbeat_at SimpleAggregateFunction(max, Int64)
)
ENGINE = AggregatingMergeTree
ORDER BY run_id
SETTINGS index_granularity = 1024;

-- One row per experiment. created is the oldest creation (as run_facts.start), last_created the newest, which counts
-- after a purge; last_start is the newest start of one of its runs: it restores a deleted experiment.
CREATE TABLE IF NOT EXISTS experiment_facts
(
    experiment_id String CODEC(ZSTD(1)),
    created SimpleAggregateFunction(max, Tuple(inverse_version UInt128, name String, artifact_uri String, created_at Int64)),
    last_created SimpleAggregateFunction(max, Tuple(version UInt128, name String, artifact_uri String, created_at Int64)),
    name SimpleAggregateFunction(max, Tuple(version UInt128, name String)),
    lifecycle SimpleAggregateFunction(max, Tuple(version UInt128, stage String)),
    last_start SimpleAggregateFunction(max, Tuple(version UInt128, run_id String)),
    updated_at SimpleAggregateFunction(max, Int64)
)
ENGINE = AggregatingMergeTree
ORDER BY experiment_id;

CREATE TABLE IF NOT EXISTS param_facts
(
    run_id String CODEC(ZSTD(1)),
    key LowCardinality(String) CODEC(ZSTD(1)),
    first SimpleAggregateFunction(min, Tuple(time_ms Int64, seq Int64, value String)),
    smallest SimpleAggregateFunction(min, String),
    largest SimpleAggregateFunction(max, String)
)
ENGINE = AggregatingMergeTree
ORDER BY (run_id, key)
SETTINGS index_granularity = 1024;

CREATE TABLE IF NOT EXISTS run_tag_facts
(
    run_id String CODEC(ZSTD(1)),
    key LowCardinality(String) CODEC(ZSTD(1)),
    latest SimpleAggregateFunction(max, Tuple(version UInt128, deleted UInt8, value String))
)
ENGINE = AggregatingMergeTree
ORDER BY (run_id, key)
SETTINGS index_granularity = 1024;

CREATE TABLE IF NOT EXISTS experiment_tag_facts
(
    experiment_id String CODEC(ZSTD(1)),
    key String CODEC(ZSTD(1)),
    latest SimpleAggregateFunction(max, Tuple(version UInt128, deleted UInt8, value String))
)
ENGINE = AggregatingMergeTree
ORDER BY (experiment_id, key);

CREATE TABLE IF NOT EXISTS artifact_facts
(
    run_id String CODEC(ZSTD(1)),
    path String CODEC(ZSTD(1)),
    latest SimpleAggregateFunction(max, Tuple(version UInt128, deleted UInt8, size_bytes Int64, digest String, time_ms Int64))
)
ENGINE = AggregatingMergeTree
ORDER BY (run_id, path);

CREATE TABLE IF NOT EXISTS input_facts
(
    run_id String CODEC(ZSTD(1)),
    name String CODEC(ZSTD(1)),
    digest String CODEC(ZSTD(1)),
    latest SimpleAggregateFunction(max, Tuple(version UInt128, source_type String, source String, schema String,
        profile String, context String, tags Map(String, String), time_ms Int64))
)
ENGINE = AggregatingMergeTree
ORDER BY (run_id, name, digest);

CREATE TABLE IF NOT EXISTS purged_runs (run_id String, version SimpleAggregateFunction(max, UInt128))
ENGINE = AggregatingMergeTree ORDER BY run_id;

-- A purged experiment id may be used again: what was said of it up to version is gone.
CREATE TABLE IF NOT EXISTS purged_experiments (experiment_id String, version SimpleAggregateFunction(max, UInt128))
ENGINE = AggregatingMergeTree ORDER BY experiment_id;

-- Every log record below next_offset of its stream and partition is in the tables, in rejects or in the dead letters.
CREATE TABLE IF NOT EXISTS ingest_positions
(
    stream LowCardinality(String),
    partition Int32,
    next_offset SimpleAggregateFunction(max, Int64),
    updated_at SimpleAggregateFunction(max, DateTime64(3, 'UTC'))
)
ENGINE = AggregatingMergeTree
ORDER BY (stream, partition);

-- Bodies that decode but make no sense, and, in embedded mode, damage in the log.
CREATE TABLE IF NOT EXISTS rejects
(
    stream LowCardinality(String),
    partition Int32,
    log_offset Int64,
    event LowCardinality(String),
    reason String,
    log_time DateTime64(3, 'UTC')
)
ENGINE = ReplacingMergeTree
ORDER BY (stream, partition, log_offset);

-- What is true of this deployment as a whole, such as artifact_root.
CREATE TABLE IF NOT EXISTS settings (name String, value String, updated_at DateTime64(3, 'UTC'))
ENGINE = ReplacingMergeTree(updated_at)
ORDER BY name;

-- The Default experiment always exists; any real creation event has a larger inverse version than this one's.
INSERT INTO experiment_facts (experiment_id, created) VALUES ('0', (1, 'Default', '', 0));
