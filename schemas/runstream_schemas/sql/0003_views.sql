-- The public schema: these views and their columns are an interface.
-- A tuple column must be read whole under FINAL: the subcolumn of an aggregated tuple (status.version) comes out of the
-- first part only (measured on engine 26.9). Hence FINAL always stands in a subquery that selects whole columns.
-- They hold no duplicates, leave purged runs out, and keep deleted ones with lifecycle_stage = 'deleted'.

-- What was said of an experiment up to its purge is gone; one that is used again afterwards is a new one.
CREATE OR REPLACE VIEW experiments AS
SELECT
    x.experiment_id AS experiment_id,
    x.name AS name,
    if(x.stage = 'deleted' AND x.last_start_version < x.stage_version, 'deleted', 'active') AS lifecycle_stage,
    if(x.stage = 'deleted' AND x.last_start_version < x.stage_version,
        fromUnixTimestamp64Milli(toInt64(bitShiftRight(x.stage_version, 64)), 'UTC'), NULL) AS deleted_at,
    multiIf(
        x.artifact_uri LIKE '%://%', x.artifact_uri,
        x.artifact_uri = '', concat((SELECT value FROM settings FINAL WHERE name = 'artifact_root'), '/', x.experiment_id),
        concat((SELECT value FROM settings FINAL WHERE name = 'artifact_root'), '/', x.artifact_uri)) AS artifact_uri,
    fromUnixTimestamp64Milli(x.created_at_ms, 'UTC') AS created_at,
    fromUnixTimestamp64Milli(greatest(x.updated_at_ms, x.created_at_ms), 'UTC') AS updated_at,
    mapFromArrays(
        arrayConcat(t.tag_keys, if(x.stage = 'deleted' AND x.last_start_version > x.stage_version, ['runstream.restored_by'], [])),
        arrayConcat(t.tag_values, if(x.stage = 'deleted' AND x.last_start_version > x.stage_version, [x.last_start_run], []))) AS tags
FROM
(
    SELECT
        f.experiment_id AS experiment_id,
        p.purged_version AS purged_version,
        p.purged_version > 0 AND f.last_created.version > p.purged_version AS used_again,
        multiIf(f.name.version > p.purged_version, f.name.name, used_again, f.last_created.name, f.created.name) AS name,
        if(used_again, f.last_created.artifact_uri, f.created.artifact_uri) AS artifact_uri,
        if(used_again, f.last_created.created_at, f.created.created_at) AS created_at_ms,
        f.updated_at AS updated_at_ms,
        if(f.lifecycle.version > p.purged_version, f.lifecycle.stage, 'active') AS stage,
        f.lifecycle.version AS stage_version,
        f.last_start.version AS last_start_version,
        f.last_start.run_id AS last_start_run
    FROM (SELECT * FROM experiment_facts FINAL) AS f
    LEFT JOIN (SELECT experiment_id, max(version) AS purged_version FROM purged_experiments GROUP BY experiment_id) AS p
        ON p.experiment_id = f.experiment_id
    WHERE f.created.inverse_version > 0
        AND (p.purged_version = 0 OR greatest(f.last_created.version, f.last_start.version) > p.purged_version)
) AS x
LEFT JOIN
(
    SELECT g.experiment_id AS experiment_id, groupArray(g.key) AS tag_keys, groupArray(g.latest.value) AS tag_values
    FROM (SELECT experiment_id, key, latest FROM experiment_tag_facts FINAL) AS g
    LEFT JOIN (SELECT experiment_id, max(version) AS purged_version FROM purged_experiments GROUP BY experiment_id) AS p
        ON p.experiment_id = g.experiment_id
    WHERE g.latest.deleted = 0 AND g.latest.version > p.purged_version
    GROUP BY g.experiment_id
) AS t ON t.experiment_id = x.experiment_id;

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
        f.start.artifact_uri AS artifact_uri,
        f.start.inverse_version AS inverse_version
    FROM (SELECT * FROM run_facts FINAL) AS f
    WHERE f.start.inverse_version > 0 AND f.run_id NOT IN (SELECT run_id FROM purged_runs)
) AS r
LEFT JOIN
(
    SELECT
        x.experiment_id AS experiment_id,
        multiIf(x.name.version > p.purged_version, x.name.name,
            p.purged_version > 0 AND x.last_created.version > p.purged_version, x.last_created.name, x.created.name) AS name,
        multiIf(x.lifecycle.version <= p.purged_version, 'active',
            x.lifecycle.stage = 'deleted' AND x.last_start.version > x.lifecycle.version, 'active', x.lifecycle.stage) AS stage,
        multiIf(x.lifecycle.version <= p.purged_version, toUInt128(0),
            x.lifecycle.stage = 'deleted' AND x.last_start.version > x.lifecycle.version, x.last_start.version, x.lifecycle.version) AS stage_version,
        p.purged_version AS purged_version
    FROM (SELECT * FROM experiment_facts FINAL) AS x
    LEFT JOIN (SELECT experiment_id, max(version) AS purged_version FROM purged_experiments GROUP BY experiment_id) AS p
        ON p.experiment_id = x.experiment_id
) AS e ON e.experiment_id = r.experiment_id
-- A run whose start arrived too late to be purged one by one with its experiment.
WHERE e.purged_version = 0 OR bitNot(r.inverse_version) > e.purged_version;

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
SELECT r.run_id AS run_id, r.key AS key, r.last.step AS step, r.last.timestamp AS timestamp,
    if(r.last.is_nan, nan, r.last.value) AS value, CAST(r.min, 'Float64') AS min, CAST(r.max, 'Float64') AS max
FROM (SELECT run_id, key, last, min, max FROM rollup FINAL) AS r
WHERE r.run_id NOT IN (SELECT run_id FROM purged_runs);

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
