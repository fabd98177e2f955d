-- Logged models: what runs make besides artifacts (MLflow 3). The same rules as for runs and experiments hold.

CREATE TABLE IF NOT EXISTS model_facts
(
    model_id String CODEC(ZSTD(1)),
    created SimpleAggregateFunction(max, Tuple(inverse_version UInt128, experiment_id String, name String, model_type String,
        source_run_id String, artifact_uri String, created_at Int64)),
    status SimpleAggregateFunction(max, Tuple(version UInt128, status String)),
    lifecycle SimpleAggregateFunction(max, Tuple(version UInt128, stage String)),
    updated_at SimpleAggregateFunction(max, Int64)
)
ENGINE = AggregatingMergeTree
ORDER BY model_id;

CREATE TABLE IF NOT EXISTS model_param_facts
(
    model_id String CODEC(ZSTD(1)),
    key LowCardinality(String) CODEC(ZSTD(1)),
    first SimpleAggregateFunction(min, Tuple(time_ms Int64, seq Int64, value String))
)
ENGINE = AggregatingMergeTree
ORDER BY (model_id, key);

CREATE TABLE IF NOT EXISTS model_tag_facts
(
    model_id String CODEC(ZSTD(1)),
    key LowCardinality(String) CODEC(ZSTD(1)),
    latest SimpleAggregateFunction(max, Tuple(version UInt128, deleted UInt8, value String))
)
ENGINE = AggregatingMergeTree
ORDER BY (model_id, key);

-- value_bits tells points apart that differ in nothing else, NaN included.
CREATE TABLE IF NOT EXISTS model_points
(
    model_id String CODEC(ZSTD(1)),
    key LowCardinality(String) CODEC(ZSTD(1)),
    step Int64 CODEC(ZSTD(1)),
    timestamp DateTime64(3, 'UTC') CODEC(ZSTD(1)),
    run_id String CODEC(ZSTD(1)),
    dataset_name String CODEC(ZSTD(1)),
    dataset_digest String CODEC(ZSTD(1)),
    value_bits UInt64 CODEC(ZSTD(1)),
    value Float64 CODEC(ZSTD(1))
)
ENGINE = ReplacingMergeTree
ORDER BY (model_id, key, step, timestamp, run_id, dataset_name, dataset_digest, value_bits);

CREATE TABLE IF NOT EXISTS model_links
(
    run_id String CODEC(ZSTD(1)),
    direction LowCardinality(String) CODEC(ZSTD(1)),
    model_id String CODEC(ZSTD(1)),
    step SimpleAggregateFunction(max, Int64),
    logged_at SimpleAggregateFunction(max, Int64)
)
ENGINE = AggregatingMergeTree
ORDER BY (run_id, direction, model_id);

CREATE TABLE IF NOT EXISTS landing_logged_model
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    model_id String, experiment_id String, name String, model_type String, source_run_id String, artifact_uri String,
    created_at Int64, status String, lifecycle_stage String,
    param_keys Array(String), param_values Array(String),
    tag_keys Array(String), tag_values Array(String), deleted_tag_keys Array(String),
    metric_run_id String, metric_keys Array(String), metric_values Array(Float64), metric_steps Array(Int64),
    metric_times Array(Int64), metric_dataset_names Array(String), metric_dataset_digests Array(String),
    time_ms Int64, seq Int64, writer Int64,
    version UInt128 MATERIALIZED bitOr(bitOr(bitShiftLeft(toUInt128(least(time_ms, log_time)), 64), bitShiftLeft(toUInt128(bitAnd(seq, 4294967295)), 32)), toUInt128(bitAnd(writer, 4294967295))),
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(model_id) NOT BETWEEN 1 AND 256 OR NOT isValidUTF8(model_id), 'model_id must have 1 to 256 bytes of UTF-8',
        length(experiment_id) > 64, 'experiment_id must have at most 64 bytes',
        status NOT IN ('', 'PENDING', 'READY', 'UPLOAD_FAILED'), 'unknown status',
        lifecycle_stage NOT IN ('', 'active', 'deleted'), 'unknown lifecycle_stage',
        length(param_keys) != length(param_values), 'param keys and values differ in length',
        length(tag_keys) != length(tag_values), 'tag keys and values differ in length',
        length(metric_keys) != length(metric_values) OR length(metric_keys) != length(metric_steps)
            OR length(metric_keys) != length(metric_times) OR length(metric_keys) != length(metric_dataset_names)
            OR length(metric_keys) != length(metric_dataset_digests), 'the metric arrays differ in length',
        notEmpty(metric_times) AND (arrayMin(metric_times) < 0 OR arrayMax(metric_times) >= 9214646400000), 'a time is outside [0, year 2262)',
        arrayExists(k -> length(k) NOT BETWEEN 1 AND 1000 OR NOT isValidUTF8(k), arrayConcat(param_keys, tag_keys, deleted_tag_keys, metric_keys)), 'a key is empty, too long or not UTF-8',
        arrayExists(v -> NOT isValidUTF8(v), arrayConcat(param_values, tag_values)), 'a value is not UTF-8',
        time_ms < 0 OR time_ms >= 9214646400000 OR created_at < 0 OR created_at >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_logged_model_facts TO model_facts AS
SELECT model_id,
    if(landing_logged_model.experiment_id = '', (toUInt128(0), '', '', '', '', '', toInt64(0)),
        (bitNot(version), experiment_id, landing_logged_model.name, model_type, source_run_id, artifact_uri, created_at)) AS created,
    if(landing_logged_model.status = '', (toUInt128(0), ''), (version, landing_logged_model.status)) AS status,
    if(lifecycle_stage = '', (toUInt128(0), ''), (version, lifecycle_stage)) AS lifecycle,
    if(landing_logged_model.experiment_id != '' OR landing_logged_model.status != '' OR lifecycle_stage != '', least(time_ms, log_time), 0) AS updated_at
FROM landing_logged_model WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_logged_model_params TO model_param_facts AS
SELECT model_id, key, (time_ms, seq, value) AS first
FROM landing_logged_model ARRAY JOIN param_keys AS key, param_values AS value WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_logged_model_tags TO model_tag_facts AS
SELECT model_id, key, (version, deleted, value) AS latest
FROM landing_logged_model
ARRAY JOIN
    arrayConcat(tag_keys, deleted_tag_keys) AS key,
    arrayConcat(arrayMap(v -> toUInt8(0), tag_values), arrayMap(k -> toUInt8(1), deleted_tag_keys)) AS deleted,
    arrayConcat(tag_values, arrayMap(k -> '', deleted_tag_keys)) AS value
WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_logged_model_points TO model_points AS
SELECT model_id, key, step, fromUnixTimestamp64Milli(time, 'UTC') AS timestamp, metric_run_id AS run_id, dataset_name,
    dataset_digest, reinterpretAsUInt64(value) AS value_bits, value
FROM landing_logged_model
ARRAY JOIN metric_keys AS key, metric_values AS value, metric_steps AS step, metric_times AS time,
    metric_dataset_names AS dataset_name, metric_dataset_digests AS dataset_digest
WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_logged_model_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'logged_model' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_logged_model WHERE reason != '';

CREATE TABLE IF NOT EXISTS landing_models_linked
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    run_id String, direction String, model_ids Array(String), steps Array(Int64),
    time_ms Int64, seq Int64, writer Int64,
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(run_id) NOT BETWEEN 1 AND 256 OR NOT isValidUTF8(run_id), 'run_id must have 1 to 256 bytes of UTF-8',
        direction NOT IN ('input', 'output'), 'direction must be input or output',
        length(model_ids) != length(steps), 'model_ids and steps differ in length',
        arrayExists(m -> length(m) NOT BETWEEN 1 AND 256 OR NOT isValidUTF8(m), model_ids), 'a model id must have 1 to 256 bytes of UTF-8',
        time_ms < 0 OR time_ms >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_models_linked_links TO model_links AS
SELECT run_id, direction, model_id, step, least(time_ms, log_time) AS logged_at
FROM landing_models_linked ARRAY JOIN model_ids AS model_id, steps AS step WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_models_linked_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'models_linked' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_models_linked WHERE reason != '';

CREATE TABLE IF NOT EXISTS probe_logged_model AS landing_logged_model ENGINE = Null;

CREATE TABLE IF NOT EXISTS probe_models_linked AS landing_models_linked ENGINE = Null;

CREATE OR REPLACE VIEW logged_models AS
SELECT
    m.model_id AS model_id,
    m.created.experiment_id AS experiment_id,
    m.created.name AS name,
    m.created.model_type AS model_type,
    if(m.status.version > 0, m.status.status, 'PENDING') AS status,
    if(m.lifecycle.stage = 'deleted', 'deleted', 'active') AS lifecycle_stage,
    m.created.source_run_id AS source_run_id,
    if(m.created.artifact_uri LIKE '%://%', m.created.artifact_uri,
        concat((SELECT value FROM settings FINAL WHERE name = 'artifact_root'), '/', m.created.artifact_uri)) AS artifact_uri,
    fromUnixTimestamp64Milli(m.created.created_at, 'UTC') AS created_at,
    fromUnixTimestamp64Milli(greatest(m.updated_at, m.created.created_at), 'UTC') AS updated_at
FROM (SELECT * FROM model_facts FINAL) AS m
WHERE m.created.inverse_version > 0;

CREATE OR REPLACE VIEW model_params AS
SELECT model_id, key, first.value AS value FROM (SELECT model_id, key, first FROM model_param_facts FINAL);

CREATE OR REPLACE VIEW model_tags AS
SELECT model_id, key, latest.value AS value,
    fromUnixTimestamp64Milli(toInt64(bitShiftRight(latest.version, 64)), 'UTC') AS updated_at
FROM (SELECT model_id, key, latest FROM model_tag_facts FINAL)
WHERE latest.deleted = 0;

CREATE OR REPLACE VIEW model_metrics AS
SELECT model_id, key, step, timestamp, value, run_id, dataset_name, dataset_digest
FROM model_points FINAL
WHERE run_id NOT IN (SELECT run_id FROM purged_runs);

CREATE OR REPLACE VIEW run_models AS
SELECT run_id, direction, model_id, step, fromUnixTimestamp64Milli(logged_at, 'UTC') AS logged_at
FROM (SELECT * FROM model_links FINAL)
WHERE run_id NOT IN (SELECT run_id FROM purged_runs);
