-- The public schema: these views and their columns are an interface.
-- A tuple column must be read whole under FINAL: the subcolumn of an aggregated tuple (status.version) comes out of the
-- first part only (measured on engine 26.9). Hence FINAL always stands in a subquery that selects whole columns.
-- They hold no duplicates, leave purged runs out, and keep deleted ones with lifecycle_stage = 'deleted'.

CREATE OR REPLACE VIEW experiments AS
SELECT
    f.experiment_id AS experiment_id,
    if(f.name.version > 0, f.name.name, f.created.name) AS name,
    if(f.lifecycle.stage = 'deleted' AND f.last_start.version < f.lifecycle.version, 'deleted', 'active') AS lifecycle_stage,
    if(f.lifecycle.stage = 'deleted' AND f.last_start.version < f.lifecycle.version,
        fromUnixTimestamp64Milli(toInt64(bitShiftRight(f.lifecycle.version, 64)), 'UTC'), NULL) AS deleted_at,
    multiIf(
        f.created.artifact_uri LIKE '%://%', f.created.artifact_uri,
        f.created.artifact_uri = '', concat((SELECT value FROM settings FINAL WHERE name = 'artifact_root'), '/', f.experiment_id),
        concat((SELECT value FROM settings FINAL WHERE name = 'artifact_root'), '/', f.created.artifact_uri)) AS artifact_uri,
    fromUnixTimestamp64Milli(f.created.created_at, 'UTC') AS created_at,
    fromUnixTimestamp64Milli(greatest(f.updated_at, f.created.created_at), 'UTC') AS updated_at,
    mapFromArrays(
        arrayConcat(t.tag_keys, if(f.lifecycle.stage = 'deleted' AND f.last_start.version > f.lifecycle.version, ['runstream.restored_by'], [])),
        arrayConcat(t.tag_values, if(f.lifecycle.stage = 'deleted' AND f.last_start.version > f.lifecycle.version, [f.last_start.run_id], []))) AS tags
FROM (SELECT * FROM experiment_facts FINAL) AS f
LEFT JOIN
(
    SELECT experiment_id, groupArray(key) AS tag_keys, groupArray(latest.value) AS tag_values
    FROM (SELECT experiment_id, key, latest FROM experiment_tag_facts FINAL)
    WHERE latest.deleted = 0
    GROUP BY experiment_id
) AS t ON t.experiment_id = f.experiment_id
LEFT JOIN (SELECT experiment_id, max(version) AS purged_version FROM purged_experiments GROUP BY experiment_id) AS p
    ON p.experiment_id = f.experiment_id
WHERE f.created.inverse_version > 0
    AND greatest(f.last_created, f.last_start.version, f.name.version, f.lifecycle.version) >= p.purged_version
    AND (p.purged_version = 0 OR greatest(f.last_created, f.last_start.version) > p.purged_version);

CREATE OR REPLACE VIEW runs AS
SELECT
    r.run_id AS run_id,
    r.experiment_id AS experiment_id,
    e.name AS experiment_name,
    r.name AS name,
    r.status AS status,
    if(if(e.stage_version > r.stage_version, e.stage, r.stage) = 'deleted', 'deleted', 'active') AS lifecycle_stage,
    if(if(e.stage_version > r.stage_version, e.stage, r.stage) = 'deleted',
        fromUnixTimestamp64Milli(toInt64(bitShiftRight(greatest(e.stage_version, r.stage_version), 64)), 'UTC'), NULL) AS deleted_at,
    r.user AS user,
    r.source_name AS source_name,
    r.source_type AS source_type,
    r.source_version AS source_version,
    fromUnixTimestamp64Milli(r.started_at_ms, 'UTC') AS started_at,
    if(r.ended_at_ms < 0 OR r.status IN ('RUNNING', 'SCHEDULED'), NULL, fromUnixTimestamp64Milli(r.ended_at_ms, 'UTC')) AS ended_at,
    fromUnixTimestamp64Milli(r.heartbeat_at_ms, 'UTC') AS heartbeat_at,
    r.status = 'RUNNING' AND r.heartbeat_at_ms < toUnixTimestamp64Milli(now64(3)) - 120000 AS lost,
    r.parent_run_id AS parent_run_id,
    if(r.artifact_uri LIKE '%://%', r.artifact_uri,
        concat((SELECT value FROM settings FINAL WHERE name = 'artifact_root'), '/', r.artifact_uri)) AS artifact_uri
FROM
(
    SELECT
        f.run_id AS run_id,
        f.start.experiment_id AS experiment_id,
        if(f.name.version > 0, f.name.name, f.start.name) AS name,
        if(f.status.version > 0, f.status.status, 'RUNNING') AS status,
        if(f.status.version > 0, f.status.ended_at, -1) AS ended_at_ms,
        f.lifecycle.version AS stage_version,
        f.lifecycle.stage AS stage,
        f.start.user AS user,
        f.start.source_name AS source_name,
        f.start.source_type AS source_type,
        f.start.source_version AS source_version,
        f.start.started_at AS started_at_ms,
        f.heartbeat_at AS heartbeat_at_ms,
        f.start.parent_run_id AS parent_run_id,
        f.start.artifact_uri AS artifact_uri
    FROM (SELECT * FROM run_facts FINAL) AS f
    WHERE f.start.inverse_version > 0 AND f.run_id NOT IN (SELECT run_id FROM purged_runs)
) AS r
LEFT JOIN
(
    SELECT
        experiment_id,
        if(x.name.version > 0, x.name.name, x.created.name) AS name,
        if(x.lifecycle.stage = 'deleted' AND x.last_start.version > x.lifecycle.version, 'active', x.lifecycle.stage) AS stage,
        if(x.lifecycle.stage = 'deleted' AND x.last_start.version > x.lifecycle.version, x.last_start.version, x.lifecycle.version) AS stage_version
    FROM (SELECT * FROM experiment_facts FINAL) AS x
) AS e ON e.experiment_id = r.experiment_id;

CREATE OR REPLACE VIEW params AS
SELECT run_id, key, first.value AS value, smallest != largest AS conflict
FROM (SELECT run_id, key, first, smallest, largest FROM param_facts FINAL)
WHERE run_id NOT IN (SELECT run_id FROM purged_runs);

CREATE OR REPLACE VIEW tags AS
SELECT run_id, key, latest.value AS value,
    fromUnixTimestamp64Milli(toInt64(bitShiftRight(latest.version, 64)), 'UTC') AS updated_at
FROM (SELECT run_id, key, latest FROM run_tag_facts FINAL)
WHERE latest.deleted = 0 AND run_id NOT IN (SELECT run_id FROM purged_runs);

CREATE OR REPLACE VIEW metrics AS
SELECT run_id, key, step, timestamp, value
FROM points FINAL
WHERE run_id NOT IN (SELECT run_id FROM purged_runs);

CREATE OR REPLACE VIEW latest_metrics AS
SELECT run_id, key, last.step AS step, last.timestamp AS timestamp, if(last.is_nan, nan, last.value) AS value, min, max
FROM (SELECT run_id, key, last, min, max FROM rollup FINAL)
WHERE run_id NOT IN (SELECT run_id FROM purged_runs);

CREATE OR REPLACE VIEW inputs AS
SELECT run_id, name, digest, latest.source_type AS source_type, latest.source AS source, latest.schema AS schema,
    latest.profile AS profile, latest.context AS context, latest.tags AS tags,
    fromUnixTimestamp64Milli(latest.time_ms, 'UTC') AS logged_at
FROM (SELECT run_id, name, digest, latest FROM input_facts FINAL)
WHERE run_id NOT IN (SELECT run_id FROM purged_runs);

CREATE OR REPLACE VIEW artifacts AS
SELECT run_id, path, latest.size_bytes AS size_bytes, latest.digest AS digest,
    fromUnixTimestamp64Milli(latest.time_ms, 'UTC') AS logged_at
FROM (SELECT run_id, path, latest FROM artifact_facts FINAL)
WHERE latest.deleted = 0 AND run_id NOT IN (SELECT run_id FROM purged_runs);
