-- Landing tables take the raw Avro bodies (one column per field, plus where in the log the body lay, and log_mark, a
-- constant that the worker puts behind every body: read as anything else, bytes are missing or left over); views fan them
-- out. reason is computed once per insert: empty for a body that makes sense. Times are UTC milliseconds.
-- 9214646400000 is limits.MAX_TIME_MS; 256, 64 and 1000 are the limits of ids, experiment ids and keys in bytes.

CREATE TABLE IF NOT EXISTS landing_metric_batch
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    run_id LowCardinality(String), writer Int64, first_seq Int64, sent_at Int64,
    keys Array(LowCardinality(String)), steps Array(Int64), times Array(Int64),
    ki Array(Int32), ci Array(Int32), values Array(Float64), seqs Array(Int64),
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(run_id) NOT BETWEEN 1 AND 256 OR NOT isValidUTF8(run_id), 'run_id must have 1 to 256 bytes of UTF-8',
        length(ki) != length(values) OR length(ci) != length(values), 'ki, ci and values differ in length',
        length(steps) != length(times), 'steps and times differ in length',
        notEmpty(seqs) AND length(seqs) != length(values), 'seqs and values differ in length',
        notEmpty(ki) AND (arrayMin(ki) < 0 OR arrayMax(ki) >= length(keys)), 'ki points outside keys',
        notEmpty(ci) AND (arrayMin(ci) < 0 OR arrayMax(ci) >= length(steps)), 'ci points outside steps',
        notEmpty(times) AND (arrayMin(times) < 0 OR arrayMax(times) >= 9214646400000), 'a time is outside [0, year 2262)',
        arrayExists(k -> length(k) NOT BETWEEN 1 AND 1000 OR NOT isValidUTF8(k), keys), 'a key is empty, too long or not UTF-8',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_metric_batch_points TO points AS
SELECT run_id, key, call.1 AS step, call.2 AS timestamp, value, writer, seq, log_partition, log_offset
FROM
(
    SELECT
        run_id, writer, log_partition, log_offset,
        arrayZip(steps, arrayMap(t -> fromUnixTimestamp64Milli(t, 'UTC'), times)) AS calls,
        arrayMap(i -> keys[i + 1], ki) AS key_list,
        arrayMap(i -> calls[i + 1], ci) AS call_list,
        values,
        if(empty(seqs), range(first_seq, first_seq + length(values)), seqs) AS seq_list
    FROM landing_metric_batch
    WHERE reason = ''
)
ARRAY JOIN key_list AS key, call_list AS call, values AS value, seq_list AS seq;

-- From the arrays, not from points: grouping by a 16-byte hash made once per key of a body, and taking the largest of
-- one number instead of a tuple, costs 0.15 instead of 0.35 CPU-seconds per million points. The number is
-- step (64 bits, sign flipped) | time (64) | value (64), where the value's bits are made to sort as the value does:
-- negative ones inverted, 2^63 for 0.0 and -0.0, 2^63 + 1 for NaN, the bits + 2^63 + 1 above.
CREATE MATERIALIZED VIEW IF NOT EXISTS landing_metric_batch_rollup TO rollup AS
WITH
    max(place) AS largest,
    toUInt64(bitAnd(largest, 18446744073709551615)) AS sortable
SELECT
    any(run_id) AS run_id, any(key) AS key,
    (
        reinterpretAsInt64(bitXor(toUInt64(bitShiftRight(largest, 128)), 9223372036854775808)),
        fromUnixTimestamp64Milli(toInt64(bitAnd(bitShiftRight(largest, 64), 18446744073709551615)), 'UTC'),
        reinterpretAsFloat64(multiIf(
            sortable < 9223372036854775808, bitNot(sortable),
            sortable <= 9223372036854775809, toUInt64(0),
            sortable - 9223372036854775809)),
        toUInt8(sortable = 9223372036854775809)
    ) AS last,
    min(value + 0.0) AS min, max(value + 0.0) AS max  -- + 0.0: which of -0.0 and 0.0 is met first must not show
FROM
(
    SELECT run_id, key, key_hash, value,
        bitOr(call, toUInt256(if(value > 0, reinterpretAsUInt64(value) + 9223372036854775809,
            if(value < 0, bitNot(reinterpretAsUInt64(value)), 9223372036854775808 + isNaN(value))))) AS place
    FROM
    (
        SELECT
            run_id, values,
            arrayMap(k -> sipHash128(run_id, k), keys) AS hashes,
            arrayMap((s, t) -> bitOr(
                bitShiftLeft(toUInt256(bitXor(reinterpretAsUInt64(s), 9223372036854775808)), 128),
                bitShiftLeft(toUInt256(t), 64)), steps, times) AS calls,
            arrayMap(i -> keys[i + 1], ki) AS key_list,
            arrayMap(i -> hashes[i + 1], ki) AS hash_list,
            arrayMap(i -> calls[i + 1], ci) AS call_list
        FROM landing_metric_batch
        WHERE reason = ''
    )
    ARRAY JOIN key_list AS key, hash_list AS key_hash, call_list AS call, values AS value
)
GROUP BY key_hash;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_metric_batch_heartbeat TO run_facts AS
SELECT run_id, max(least(sent_at, log_time)) AS heartbeat_at
FROM landing_metric_batch WHERE reason = '' GROUP BY run_id;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_metric_batch_rejects TO rejects AS
SELECT 'metrics' AS stream, log_partition AS partition, log_offset, 'metric_batch' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_metric_batch WHERE reason != '';

CREATE TABLE IF NOT EXISTS landing_run_started
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    run_id String, experiment_id String, name String, user String, source_name String, source_type String,
    source_version String, artifact_uri String, parent_run_id String, started_at Int64,
    time_ms Int64, seq Int64, writer Int64,
    version UInt128 MATERIALIZED bitOr(bitOr(bitShiftLeft(toUInt128(least(time_ms, log_time)), 64), bitShiftLeft(toUInt128(bitAnd(seq, 4294967295)), 32)), toUInt128(bitAnd(writer, 4294967295))),
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(run_id) NOT BETWEEN 1 AND 256 OR NOT isValidUTF8(run_id), 'run_id must have 1 to 256 bytes of UTF-8',
        length(experiment_id) NOT BETWEEN 1 AND 64, 'experiment_id must have 1 to 64 bytes',
        time_ms < 0 OR time_ms >= 9214646400000 OR started_at < 0 OR started_at >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_run_started_runs TO run_facts AS
SELECT run_id,
    (bitNot(version), experiment_id, name, user, source_name, source_type, source_version, artifact_uri, parent_run_id, started_at) AS start,
    least(time_ms, log_time) AS heartbeat_at
FROM landing_run_started WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_run_started_experiments TO experiment_facts AS
SELECT experiment_id, (version, run_id) AS last_start, least(time_ms, log_time) AS updated_at
FROM landing_run_started WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_run_started_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'run_started' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_run_started WHERE reason != '';

CREATE TABLE IF NOT EXISTS landing_run_updated
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    run_id String, status String, ended_at Int64 DEFAULT -1, name String, lifecycle_stage String,
    time_ms Int64, seq Int64, writer Int64,
    version UInt128 MATERIALIZED bitOr(bitOr(bitShiftLeft(toUInt128(least(time_ms, log_time)), 64), bitShiftLeft(toUInt128(bitAnd(seq, 4294967295)), 32)), toUInt128(bitAnd(writer, 4294967295))),
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(run_id) NOT BETWEEN 1 AND 256 OR NOT isValidUTF8(run_id), 'run_id must have 1 to 256 bytes of UTF-8',
        status NOT IN ('', 'RUNNING', 'SCHEDULED', 'FINISHED', 'FAILED', 'KILLED'), 'unknown status',
        lifecycle_stage NOT IN ('', 'active', 'deleted'), 'unknown lifecycle_stage',
        time_ms < 0 OR time_ms >= 9214646400000 OR ended_at < -1 OR ended_at >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_run_updated_runs TO run_facts AS
SELECT run_id,
    if(landing_run_updated.status = '', (toUInt128(0), '', toInt64(0)), (version, landing_run_updated.status, ended_at)) AS status,
    if(landing_run_updated.name = '', (toUInt128(0), ''), (version, landing_run_updated.name)) AS name,
    if(lifecycle_stage = '', (toUInt128(0), ''), (version, lifecycle_stage)) AS lifecycle,
    if(landing_run_updated.status IN ('', 'RUNNING') AND lifecycle_stage = '' AND landing_run_updated.name = '', least(time_ms, log_time), 0) AS heartbeat_at
FROM landing_run_updated WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_run_updated_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'run_updated' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_run_updated WHERE reason != '';

CREATE TABLE IF NOT EXISTS landing_params
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    run_id String, keys Array(String), values Array(String), time_ms Int64, seq Int64, writer Int64,
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(run_id) NOT BETWEEN 1 AND 256 OR NOT isValidUTF8(run_id), 'run_id must have 1 to 256 bytes of UTF-8',
        length(keys) != length(values), 'keys and values differ in length',
        arrayExists(k -> length(k) NOT BETWEEN 1 AND 1000 OR NOT isValidUTF8(k), keys), 'a key is empty, too long or not UTF-8',
        arrayExists(v -> NOT isValidUTF8(v), values), 'a value is not UTF-8',
        time_ms < 0 OR time_ms >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_params_facts TO param_facts AS
SELECT run_id, key, (time_ms, seq, value) AS first, value AS smallest, value AS largest
FROM landing_params ARRAY JOIN keys AS key, values AS value WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_params_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'params' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_params WHERE reason != '';

CREATE TABLE IF NOT EXISTS landing_run_tags
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    run_id String, keys Array(String), values Array(String), deleted_keys Array(String),
    time_ms Int64, seq Int64, writer Int64,
    version UInt128 MATERIALIZED bitOr(bitOr(bitShiftLeft(toUInt128(least(time_ms, log_time)), 64), bitShiftLeft(toUInt128(bitAnd(seq, 4294967295)), 32)), toUInt128(bitAnd(writer, 4294967295))),
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(run_id) NOT BETWEEN 1 AND 256 OR NOT isValidUTF8(run_id), 'run_id must have 1 to 256 bytes of UTF-8',
        length(keys) != length(values), 'keys and values differ in length',
        arrayExists(k -> length(k) NOT BETWEEN 1 AND 1000 OR NOT isValidUTF8(k), arrayConcat(keys, deleted_keys)), 'a key is empty, too long or not UTF-8',
        arrayExists(v -> NOT isValidUTF8(v), values), 'a value is not UTF-8',
        time_ms < 0 OR time_ms >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_run_tags_facts TO run_tag_facts AS
SELECT run_id, key, (version, deleted, value) AS latest
FROM landing_run_tags
ARRAY JOIN
    arrayConcat(keys, deleted_keys) AS key,
    arrayConcat(values, arrayMap(k -> '', deleted_keys)) AS value,
    arrayConcat(arrayMap(k -> 0, keys), arrayMap(k -> 1, deleted_keys)) AS deleted
WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_run_tags_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'run_tags' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_run_tags WHERE reason != '';

CREATE TABLE IF NOT EXISTS landing_experiment_tags
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    experiment_id String, keys Array(String), values Array(String), deleted_keys Array(String),
    time_ms Int64, seq Int64, writer Int64,
    version UInt128 MATERIALIZED bitOr(bitOr(bitShiftLeft(toUInt128(least(time_ms, log_time)), 64), bitShiftLeft(toUInt128(bitAnd(seq, 4294967295)), 32)), toUInt128(bitAnd(writer, 4294967295))),
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(experiment_id) NOT BETWEEN 1 AND 64, 'experiment_id must have 1 to 64 bytes',
        length(keys) != length(values), 'keys and values differ in length',
        arrayExists(k -> length(k) NOT BETWEEN 1 AND 1000 OR NOT isValidUTF8(k), arrayConcat(keys, deleted_keys)), 'a key is empty, too long or not UTF-8',
        arrayExists(v -> NOT isValidUTF8(v), values), 'a value is not UTF-8',
        time_ms < 0 OR time_ms >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_experiment_tags_facts TO experiment_tag_facts AS
SELECT experiment_id, key, (version, deleted, value) AS latest
FROM landing_experiment_tags
ARRAY JOIN
    arrayConcat(keys, deleted_keys) AS key,
    arrayConcat(values, arrayMap(k -> '', deleted_keys)) AS value,
    arrayConcat(arrayMap(k -> 0, keys), arrayMap(k -> 1, deleted_keys)) AS deleted
WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_experiment_tags_experiments TO experiment_facts AS
SELECT experiment_id, least(time_ms, log_time) AS updated_at
FROM landing_experiment_tags WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_experiment_tags_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'experiment_tags' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_experiment_tags WHERE reason != '';

CREATE TABLE IF NOT EXISTS landing_experiment_created
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    experiment_id String, name String, artifact_uri String, created_at Int64, time_ms Int64, seq Int64, writer Int64,
    version UInt128 MATERIALIZED bitOr(bitOr(bitShiftLeft(toUInt128(least(time_ms, log_time)), 64), bitShiftLeft(toUInt128(bitAnd(seq, 4294967295)), 32)), toUInt128(bitAnd(writer, 4294967295))),
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(experiment_id) NOT BETWEEN 1 AND 64, 'experiment_id must have 1 to 64 bytes',
        length(name) NOT BETWEEN 1 AND 2000 OR NOT isValidUTF8(name), 'the name is empty, too long or not UTF-8',
        time_ms < 0 OR time_ms >= 9214646400000 OR created_at < 0 OR created_at >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_experiment_created_experiments TO experiment_facts AS
SELECT experiment_id, (bitNot(version), name, artifact_uri, created_at) AS created, (version, name, artifact_uri, created_at) AS last_created,
    created_at AS updated_at
FROM landing_experiment_created WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_experiment_created_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'experiment_created' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_experiment_created WHERE reason != '';

CREATE TABLE IF NOT EXISTS landing_experiment_updated
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    experiment_id String, name String, lifecycle_stage String, time_ms Int64, seq Int64, writer Int64,
    version UInt128 MATERIALIZED bitOr(bitOr(bitShiftLeft(toUInt128(least(time_ms, log_time)), 64), bitShiftLeft(toUInt128(bitAnd(seq, 4294967295)), 32)), toUInt128(bitAnd(writer, 4294967295))),
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(experiment_id) NOT BETWEEN 1 AND 64, 'experiment_id must have 1 to 64 bytes',
        length(name) > 2000 OR NOT isValidUTF8(name), 'the name is too long or not UTF-8',
        lifecycle_stage NOT IN ('', 'active', 'deleted'), 'unknown lifecycle_stage',
        time_ms < 0 OR time_ms >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_experiment_updated_experiments TO experiment_facts AS
SELECT experiment_id,
    if(landing_experiment_updated.name = '', (toUInt128(0), ''), (version, landing_experiment_updated.name)) AS name,
    if(lifecycle_stage = '', (toUInt128(0), ''), (version, lifecycle_stage)) AS lifecycle,
    least(time_ms, log_time) AS updated_at
FROM landing_experiment_updated WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_experiment_updated_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'experiment_updated' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_experiment_updated WHERE reason != '';

CREATE TABLE IF NOT EXISTS landing_artifact_logged
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    run_id String, path String, size_bytes Int64, digest String, deleted UInt8, time_ms Int64, seq Int64, writer Int64,
    version UInt128 MATERIALIZED bitOr(bitOr(bitShiftLeft(toUInt128(least(time_ms, log_time)), 64), bitShiftLeft(toUInt128(bitAnd(seq, 4294967295)), 32)), toUInt128(bitAnd(writer, 4294967295))),
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(run_id) NOT BETWEEN 1 AND 256 OR NOT isValidUTF8(run_id), 'run_id must have 1 to 256 bytes of UTF-8',
        length(path) NOT BETWEEN 1 AND 4000 OR NOT isValidUTF8(path), 'the path is empty, too long or not UTF-8',
        size_bytes < 0, 'size_bytes is negative',
        time_ms < 0 OR time_ms >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_artifact_logged_facts TO artifact_facts AS
SELECT run_id, path, (version, deleted, size_bytes, digest, time_ms) AS latest
FROM landing_artifact_logged WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_artifact_logged_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'artifact_logged' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_artifact_logged WHERE reason != '';

CREATE TABLE IF NOT EXISTS landing_input_logged
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    run_id String, name String, digest String, source_type String, source String, schema String, profile String,
    context String, tags Map(String, String), time_ms Int64, seq Int64, writer Int64,
    version UInt128 MATERIALIZED bitOr(bitOr(bitShiftLeft(toUInt128(least(time_ms, log_time)), 64), bitShiftLeft(toUInt128(bitAnd(seq, 4294967295)), 32)), toUInt128(bitAnd(writer, 4294967295))),
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        length(run_id) NOT BETWEEN 1 AND 256 OR NOT isValidUTF8(run_id), 'run_id must have 1 to 256 bytes of UTF-8',
        length(name) NOT BETWEEN 1 AND 2000 OR NOT isValidUTF8(name), 'the name is empty, too long or not UTF-8',
        time_ms < 0 OR time_ms >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_input_logged_facts TO input_facts AS
SELECT run_id, name, digest, (version, source_type, source, schema, profile, context, tags, time_ms) AS latest
FROM landing_input_logged WHERE reason = '';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_input_logged_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'input_logged' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_input_logged WHERE reason != '';

CREATE TABLE IF NOT EXISTS landing_purged
(
    log_partition Int32, log_offset Int64, log_time Int64, log_mark Int64,
    kind String, id String, time_ms Int64, seq Int64, writer Int64,
    version UInt128 MATERIALIZED bitOr(bitOr(bitShiftLeft(toUInt128(least(time_ms, log_time)), 64), bitShiftLeft(toUInt128(bitAnd(seq, 4294967295)), 32)), toUInt128(bitAnd(writer, 4294967295))),
    reason LowCardinality(String) MATERIALIZED multiIf(
        log_mark != 1381192526, 'the body is longer or shorter than its schema says',
        kind NOT IN ('run', 'experiment'), 'kind must be run or experiment',
        length(id) NOT BETWEEN 1 AND 256, 'id must have 1 to 256 bytes',
        time_ms < 0 OR time_ms >= 9214646400000, 'a time is outside [0, year 2262)',
        '')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_purged_runs TO purged_runs AS
SELECT id AS run_id, version FROM landing_purged WHERE reason = '' AND kind = 'run';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_purged_experiments TO purged_experiments AS
SELECT id AS experiment_id, version FROM landing_purged WHERE reason = '' AND kind = 'experiment';

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_purged_rejects TO rejects AS
SELECT 'control' AS stream, log_partition AS partition, log_offset, 'purged' AS event, reason,
    fromUnixTimestamp64Milli(log_time, 'UTC') AS log_time
FROM landing_purged WHERE reason != '';

-- Copies without views: an insert decodes and checks bodies, and keeps nothing.

CREATE TABLE IF NOT EXISTS probe_metric_batch AS landing_metric_batch ENGINE = Null;

CREATE TABLE IF NOT EXISTS probe_run_started AS landing_run_started ENGINE = Null;

CREATE TABLE IF NOT EXISTS probe_run_updated AS landing_run_updated ENGINE = Null;

CREATE TABLE IF NOT EXISTS probe_params AS landing_params ENGINE = Null;

CREATE TABLE IF NOT EXISTS probe_run_tags AS landing_run_tags ENGINE = Null;

CREATE TABLE IF NOT EXISTS probe_experiment_tags AS landing_experiment_tags ENGINE = Null;

CREATE TABLE IF NOT EXISTS probe_experiment_created AS landing_experiment_created ENGINE = Null;

CREATE TABLE IF NOT EXISTS probe_experiment_updated AS landing_experiment_updated ENGINE = Null;

CREATE TABLE IF NOT EXISTS probe_artifact_logged AS landing_artifact_logged ENGINE = Null;

CREATE TABLE IF NOT EXISTS probe_input_logged AS landing_input_logged ENGINE = Null;

CREATE TABLE IF NOT EXISTS probe_purged AS landing_purged ENGINE = Null;
