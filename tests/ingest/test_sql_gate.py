"""The read-only gate against hostile and against honest SQL.

The engine may not be opened in the test process (whoever forks afterwards hangs), so this file is also a program: it
opens an engine, runs every statement of both lists through the gate, and prints the verdicts as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runstream_ingest.local import gate
from runstream_ingest.local.engine import Chunk, Classification

HOSTILE = [
    # The scalar function file(), and every way round its name that was found.
    "SELECT file('/etc/passwd')",
    "SELECT FILE('/etc/passwd')",
    "SELECT `file`('/etc/passwd')",
    "SELECT \"file\"('/etc/passwd')",
    "SELECT `fi\\x6ce`('/etc/passwd')",
    "SELECT /* x */ file /* y */ ('/etc/passwd')",
    "SELECT file('/etc/passwd', 'default')",
    "SELECT * APPLY(file) FROM (SELECT '/etc/passwd')",
    "SELECT * APPLY file FROM (SELECT '/etc/passwd')",
    "SELECT COLUMNS('x') APPLY(file) FROM (SELECT '/etc/passwd' AS x)",
    "SELECT * APPLY(x -> file(x)) FROM (SELECT '/etc/passwd')",
    "SELECT * APPLY(toString) FROM runs",
    "SELECT arrayMap(file, ['/etc/passwd'])",
    "SELECT arrayMap(`file`, ['/etc/passwd'])",
    "SELECT arrayMap(x -> file(x), ['/etc/passwd'])",
    "SELECT arrayFilter(x -> length(file(x)) > 0, ['/etc/passwd'])",
    "WITH file AS f SELECT arrayMap(f, ['/etc/passwd'])",
    "WITH (x -> file(x)) AS f SELECT f('/etc/passwd')",
    "WITH x AS (SELECT file('/etc/passwd') AS y) SELECT y FROM x",
    "SELECT 1 WHERE file('/etc/passwd') LIKE 'root%'",
    "SELECT 1 FROM runs PREWHERE file('/etc/passwd') = ''",
    "SELECT 1 GROUP BY 1 HAVING file('/etc/passwd') != ''",
    "SELECT 1 ORDER BY file('/etc/passwd')",
    "SELECT sum(1) OVER (PARTITION BY file('/etc/passwd'))",
    "SELECT sum(1) OVER w WINDOW w AS (ORDER BY file('/etc/passwd'))",
    "SELECT 1 LIMIT length(file('/etc/passwd'))",
    "SELECT 1 UNION ALL SELECT length(file('/etc/passwd'))",
    "SELECT 1 INTERSECT SELECT length(file('/etc/passwd'))",
    "SELECT (SELECT file('/etc/passwd'))",
    "SELECT exists(SELECT file('/etc/passwd'))",
    "SELECT if(1, file('/etc/passwd'), '')",
    "SELECT * REPLACE (file('/etc/passwd') AS run_id) FROM runs",
    "SELECT arrayFold((a, x) -> concat(a, file(x)), ['/etc/passwd'], '')",
    "SELECT f.1 FROM (SELECT tuple(file('/etc/passwd')) AS f)",
    "SELECT 1 AS `a\n  Function file`, file('/etc/passwd')",
    "SELECT `x (children 1)\n   Literal 1`, file('/etc/passwd')",
    "EXPLAIN SELECT file('/etc/passwd')",
    "EXPLAIN SYNTAX SELECT file('/etc/passwd')",
    "EXPLAIN QUERY TREE SELECT file('/etc/passwd')",
    "DESCRIBE (SELECT file('/etc/passwd') AS x)",
    "SELECT fileIf('/etc/passwd', 1)",
    "SELECT 1 QUALIFY file('/etc/passwd') = ''",
    "SELECT 1 LIMIT 1 BY file('/etc/passwd')",
    "SELECT 1 AS x ORDER BY x WITH FILL FROM length(file('/etc/passwd'))",
    "SELECT 1 AS x ORDER BY x INTERPOLATE (y AS file('/etc/passwd'))",
    "SELECT * FROM runs AS a JOIN runs AS b ON file('/etc/passwd') = a.run_id",
    "SELECT * FROM runs ARRAY JOIN [file('/etc/passwd')] AS x",
    "SELECT quantile(length(file('/etc/passwd')))(1)",
    # Table functions: files, network, other programs, other databases.
    "SELECT * FROM file('/etc/passwd', 'LineAsString')",
    "SELECT * FROM file('/etc/passwd', LineAsString, 'x String')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM `/etc/passwd`",
    "SELECT * FROM fileCluster('c', '/etc/passwd')",
    "SELECT * FROM filesystem('/etc')",
    "SELECT * FROM url('http://127.0.0.1/', 'LineAsString', 'x String')",
    "SELECT * FROM urlCluster('c', 'http://127.0.0.1/')",
    "SELECT * FROM s3('http://127.0.0.1/bucket/x')",
    "SELECT * FROM s3Cluster('c', 'http://127.0.0.1/bucket/x')",
    "SELECT * FROM gcs('http://127.0.0.1/bucket/x')",
    "SELECT * FROM hdfs('hdfs://127.0.0.1/x')",
    "SELECT * FROM azureBlobStorage('http://127.0.0.1')",
    "SELECT * FROM remote('127.0.0.1:9000', system.one)",
    "SELECT * FROM remoteSecure('127.0.0.1', system.one)",
    "SELECT * FROM cluster('default', system.one)",
    "SELECT * FROM clusterAllReplicas('default', system.one)",
    "SELECT * FROM mysql('127.0.0.1:3306', 'd', 't', 'u', 'p')",
    "SELECT * FROM postgresql('127.0.0.1:5432', 'd', 't', 'u', 'p')",
    "SELECT * FROM mongodb('127.0.0.1:27017', 'd', 't', 'u', 'p')",
    "SELECT * FROM redis('127.0.0.1:6379', 'k', 'k String')",
    "SELECT * FROM sqlite('/tmp/x.db', 't')",
    "SELECT * FROM jdbc('jdbc:x', 't')",
    "SELECT * FROM odbc('DSN=x', 't')",
    "SELECT * FROM executable('id', LineAsString, 'x String')",
    "SELECT * FROM python('x')",
    "SELECT * FROM Python(data)",
    "SELECT * FROM input('x String')",
    "SELECT * FROM dictionary('d')",
    "SELECT * FROM merge('system', '.*')",
    "SELECT * FROM merge('.*')",
    "SELECT * FROM loop(runs)",
    "SELECT * FROM view(SELECT 1)",
    "SELECT * FROM viewExplain('EXPLAIN', '', (SELECT 1))",
    "SELECT * FROM viewIfPermitted(SELECT 1 ELSE null('x UInt8'))",
    "SELECT * FROM format(LineAsString, 'x')",
    "SELECT * FROM fuzzJSON('x')",
    "SELECT * FROM fuzzQuery('SELECT 1')",
    "SELECT * FROM eval('SELECT 1')",
    "SELECT * FROM generateRandom('x UInt8')",
    "SELECT * FROM null('x UInt8')",
    "SELECT * FROM mergeTreeIndex('runstream', 'points')",
    "SELECT * FROM mergeTreeProjection('runstream', 'points', 'p')",
    "SELECT * FROM iceberg('http://127.0.0.1/')",
    "SELECT * FROM icebergLocal('/etc')",
    "SELECT * FROM deltaLakeLocal('/etc')",
    "SELECT * FROM hudi('http://127.0.0.1/')",
    "SELECT * FROM paimonLocal('/etc')",
    "SELECT * FROM bigquery('x')",
    "SELECT * FROM ytsaurus('http://127.0.0.1', 'x', 'y')",
    "SELECT * FROM prometheusQuery('x', 'y', 1)",
    "SELECT * FROM timeSeriesData('x')",
    "SELECT * FROM arrowstream('127.0.0.1')",
    "SELECT * FROM runs JOIN url('http://127.0.0.1/') AS u ON 1",
    "SELECT * FROM (SELECT * FROM url('http://127.0.0.1/'))",
    "SELECT 1 IN (SELECT * FROM url('http://127.0.0.1/'))",
    "DESCRIBE TABLE url('http://127.0.0.1/')",
    "DESCRIBE file('/etc/passwd')",
    # Other databases and system tables, named in every way.
    "SELECT * FROM system.tables",
    "SELECT * FROM system . tables",
    "SELECT * FROM `system`.`tables`",
    "SELECT * FROM `sys\\x74em`.tables",
    "SELECT * FROM SYSTEM.tables",
    "SELECT * FROM system.processes",
    "SELECT * FROM system.query_log",
    "SELECT * FROM system.settings",
    "SELECT * FROM system.users",
    "SELECT * FROM system.disks",
    "SELECT * FROM system.server_settings",
    "SELECT t.* FROM system.tables AS t",
    "SELECT * EXCEPT (metadata_path) FROM system.tables",
    "SELECT COLUMNS('data') FROM system.tables",
    "SELECT t.COLUMNS('data') FROM system.tables AS t",
    "SELECT data_paths FROM system.tables",
    "SELECT `data\\x5fpaths` FROM system.tables",
    "SELECT t.data_paths[1] FROM system.tables AS t",
    "SELECT system.tables.metadata_path FROM system.tables",
    "SELECT name FROM system.tables WHERE data_paths[1] LIKE '/home%'",
    "SELECT name FROM system.tables ORDER BY data_paths",
    "SELECT x FROM system.tables ARRAY JOIN data_paths AS x",
    "SELECT {path:Identifier} FROM system.tables",
    "SELECT data_path FROM system.databases",
    "SELECT 1 FROM system.tables JOIN (SELECT ['/'] AS data_paths) AS s USING (data_paths)",
    "SELECT 1 FROM system.tables NATURAL JOIN (SELECT ['/'] AS data_paths) AS s",
    "SELECT 1 FROM system.tables NATURAL JOIN (SELECT ['/']) AS s(data_paths)",
    "WITH t AS (SELECT * FROM system.tables) SELECT name FROM t",
    "SELECT name FROM (SELECT * FROM `system`.`tables`)",
    "SELECT * FROM system.parts",
    "SELECT * FROM system.query_thread_log",
    "SELECT * FROM system.session_log",
    "SELECT * FROM system.text_log",
    "SELECT * FROM system.asynchronous_metrics",
    "SELECT * FROM system.build_options",
    "SELECT * FROM system.clusters",
    "SELECT * FROM system.grants",
    "SELECT * FROM system.roles",
    "SELECT * FROM system.row_policies",
    "SELECT * FROM system.quotas",
    "SELECT * FROM system.settings_profiles",
    "SELECT * FROM system.named_collections",
    "SELECT * FROM system.dictionaries",
    "SELECT * FROM system.macros",
    "SELECT * FROM system.storage_policies",
    "SELECT * FROM system.user_directories",
    "SELECT * FROM system.schema_inference_cache",
    "SELECT * FROM system.stack_trace",
    "SELECT * FROM system.errors",
    "SELECT * FROM system.warnings",
    "SELECT * FROM system.contributors",
    "SELECT * FROM system.events",
    "SELECT * FROM system.metrics",
    "SELECT * FROM system.numbers_mt",
    "SELECT * FROM system.zeros",
    "SELECT system.processes.query FROM system.processes",
    "SELECT system.users.name",
    "SELECT 'x' IN system.tables",
    "SELECT 'x' IN (system.functions)",
    "SELECT 'x' GLOBAL IN system.users",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM INFORMATION_SCHEMA.TABLES",
    "SELECT * FROM default.x",
    "SELECT * FROM other.x",
    "SELECT 'x' IN system.one",
    "SELECT 'x' IN information_schema.tables",
    "SELECT * FROM {t:Identifier}",
    "SELECT * FROM {d:Identifier}.tables",
    "SELECT dictGet('d', 'a', 1)",
    "SELECT dictGetOrDefault('d', 'a', 1, 2)",
    "SELECT joinGet('system.x', 'a', 1)",
    "SELECT hasColumnInTable('system', 'users', 'name')",
    "DESCRIBE system.users",
    "DESCRIBE TABLE system.users",
    "EXISTS TABLE system.users",
    "EXISTS system.users",
    "SHOW CREATE TABLE system.users",
    "SHOW TABLES FROM system",
    "SHOW TABLES FROM `system`",
    "SHOW COLUMNS FROM users FROM system",
    "SHOW TABLES WHERE file('/etc/passwd') LIKE 'root%'",
    "SHOW TABLES LIKE 'a' WHERE 1",
    "SHOW PROCESSLIST",
    "SHOW GRANTS",
    "SHOW USERS",
    "SHOW ROLES",
    "SHOW ACCESS",
    "SHOW SETTINGS LIKE '%'",
    "SHOW FUNCTIONS",
    "SHOW ENGINES",
    "SHOW CLUSTERS",
    "SHOW FILESYSTEM CACHES",
    "SHOW MERGES",
    "SHOW DATABASES LIKE '%'",
    "SHOW DATABASES WHERE file('/etc/passwd') LIKE 'root%'",
    'SHOW TABLES FROM "system"',
    "SHOW TEMPORARY TABLES",
    "SHOW DICTIONARIES",
    "SHOW CREATE DATABASE runstream",
    "SHOW CREATE USER default",
    "SHOW INDEX FROM points",
    "SHOW POLICIES",
    "SHOW QUOTAS",
    "SHOW PROFILES",
    "SHOW PRIVILEGES",
    "SHOW CURRENT ROLES",
    "SHOW ENABLED ROLES",
    "SHOW SETTING max_threads",
    # Floods of rows, and waiting in disguise.
    "SELECT * FROM zeros(100)",
    "SELECT * FROM zeros_mt(100)",
    "SELECT * FROM primes(100)",
    "SELECT * FROM generateSerialID('x')",
    "SELECT generateSerialID('x')",
    "SELECT sleep(toFloat64(3)) FROM numbers(10)",
    "SELECT arrayMap(sleep, [3])",
    "SELECT arrayMap(x -> sleep(x), [3])",
    "SELECT * FROM remote('127.0.0.1', view(SELECT file('/etc/passwd')))",
    "SELECT * FROM values('x String', file('/etc/passwd'))",
    "SELECT * FROM numbers(length(file('/etc/passwd')))",
    "SELECT * FROM url('file:///etc/passwd', 'LineAsString')",
    "SELECT * FROM s3('http://169.254.169.254/latest/meta-data', 'LineAsString')",
    "SELECT * FROM executablePool('id', LineAsString, 'x String')",
    "SELECT * FROM runstream.`.inner.x`",
    "SELECT * FROM `runstream.points/../../x`",
    "SELECT * FROM `runs.csv`",
    "SELECT * FROM 'runs.parquet'",
    # Days of processor that no limit and no KILL interrupts.
    "SELECT levenshteinDistance(repeat('a', 60000 + number), repeat('b', 60000)) FROM numbers(65000)",
    "SELECT editDistance('a', 'b')",
    "SELECT damerauLevenshteinDistance('a', 'b')",
    "SELECT arrayLevenshteinDistance([1], [2])",
    "SELECT jaroSimilarity('a', 'b')",
    # Settings, by every door.
    "SELECT 1 FORMAT JSON SETTINGS max_threads = 1",
    "SELECT 1 SETTINGS additional_table_filters = {'runs': 'length(file('/etc/passwd')) > 0'}",
    "SELECT 1 SETTINGS additional_result_filter = 'length(file('/etc/passwd')) > 0'",
    "SELECT * FROM (SELECT 1) AS x SETTINGS profile = 'default'",
    "EXPLAIN SELECT 1 SETTINGS readonly = 0",
    "EXPLAIN CURRENT TRANSACTION",
    "EXPLAIN TABLE OVERRIDE file('/etc/passwd') COLUMNS (x String)",
    "EXPLAIN AST INSERT INTO points VALUES (1)",
    "EXPLAIN SYNTAX DROP TABLE points",
    "EXPLAIN AST SET ROLE runstream_writer",
    "EXPLAIN PLAN SELECT * FROM url('http://127.0.0.1/')",
    "EXPLAIN ESTIMATE SELECT * FROM file('/etc/passwd', 'LineAsString')",
    "EXPLAIN (SELECT 1); DROP TABLE points",
    "SELECT 1 FORMAT Null; DROP TABLE points",
    "SELECT 1 /* ; */ ; /* x */ SET ROLE runstream_writer",
    "SELECT 1 -- x\n; DROP TABLE points",
    "SELECT 1 # x\n; DROP TABLE points",
    "SELECT 1\u2028; DROP TABLE points",
    "/* /* nested */ DROP TABLE points",
    "SELECT $$x$$; DROP TABLE points",
    "SELECT $a$ ' $a$; DROP TABLE points; SELECT $b$ ' $b$",
    "SELECT '\\'; DROP TABLE points; --'; DROP TABLE points",
    "SELECT fi\u200ble('/etc/passwd')",
    "SELECT ﬁle('/etc/passwd')",
    "SELECT getSubcolumn(tuple(file('/etc/passwd')), '1')",
    "SELECT arrayReduce('sum', [length(file('/etc/passwd'))])",
    "SELECT mapApply((k, v) -> (k, file(v)), map('a', '/etc/passwd'))",
    "SELECT arraySort(file, ['/etc/passwd'])",
    "SELECT arrayFold(file, ['/etc/passwd'], '')",
    "SELECT mapFilter(file, map('a', 'b'))",
    "SELECT evalMLMethod(file('/etc/passwd'), 1)",
    "SELECT initializeAggregation('any', file('/etc/passwd'))",
    "SELECT tupleElement(tuple(file('/etc/passwd')), 1)",
    "SELECT CAST(file('/etc/passwd') AS String)",
    "SELECT {f:Identifier}('/etc/passwd')",
    "SELECT joinGetOrNull('runstream.x', 'a', 1)",
    "SELECT dictHas('d', 1)",
    "SELECT dictGetHierarchy('d', 1)",
    "SELECT dictIsIn('d', 1, 2)",
    "SELECT modelEvaluate('m', 1)",
    "SELECT lowCardinalityKeys(file('/etc/passwd'))",
    "SELECT currentProfiles()",
    "SELECT enabledProfiles()",
    "SELECT currentRoles()",
    "SELECT defaultRoles()",
    "SELECT getSetting('max_threads')",
    "SELECT tcpPort()",
    "SELECT buildId()",
    "SELECT uptime()",
    "SELECT connectionId()",
    "SELECT queryID(file('/etc/passwd'))",
    "SELECT initialQueryID(file('x'))",
    "SELECT trap('access violation')",
    "SELECT addressToSymbol(1)",
    "SELECT decrypt('aes-128-ecb', 'x', 'y')",
    "SELECT throwLogicalError('x')",
    "(" * 5_000 + "SELECT 1" + ")" * 5_000,
    "SELECT " + "(" * 20_000 + "1" + ")" * 20_000,
    "SELECT " + "-" * 1 + "(1" * 3_000 + ")" * 3_000 + ", file('/etc/passwd')",
    "SELECT " + "[" * 3_000 + "]" * 3_000,
    "SELECT * FROM " + "(SELECT * FROM " * 2_000 + "numbers(1)" + ")" * 2_000,
    # Statements that write or rule.
    "INSERT INTO runs VALUES (1)",
    "INSERT INTO points SELECT * FROM points",
    "INSERT INTO FUNCTION file('/tmp/x', 'CSV') SELECT 1",
    "INSERT INTO FUNCTION url('http://127.0.0.1/', 'CSV') SELECT 1",
    "CREATE TABLE x (a UInt8) ENGINE = Memory",
    "CREATE TEMPORARY TABLE x (a UInt8)",
    "CREATE DATABASE x",
    "CREATE VIEW x AS SELECT 1",
    "CREATE FUNCTION f AS x -> x",
    "CREATE USER u",
    "CREATE ROLE r",
    "CREATE DICTIONARY d (a UInt8) PRIMARY KEY a SOURCE(FILE(path '/etc/passwd' format 'CSV')) "
    "LAYOUT(FLAT()) LIFETIME(1)",
    "CREATE NAMED COLLECTION c AS a = 1",
    "DROP TABLE points",
    "DROP DATABASE runstream",
    "TRUNCATE TABLE points",
    "ALTER TABLE points DELETE WHERE 1",
    "ALTER TABLE points ADD COLUMN x UInt8",
    "DELETE FROM points WHERE 1",
    "UPDATE points SET value = 1 WHERE 1",
    "OPTIMIZE TABLE points",
    "RENAME TABLE points TO x",
    "EXCHANGE TABLES points AND rollup",
    "DETACH TABLE points",
    "ATTACH TABLE x (a UInt8) ENGINE = Memory",
    "UNDROP TABLE x",
    "GRANT ALL ON *.* TO default",
    "REVOKE ALL ON *.* FROM default",
    "SET readonly = 0",
    "SET max_memory_usage = 0",
    "SET ROLE runstream_writer",
    "SET ROLE ALL",
    "SET DEFAULT ROLE runstream_writer TO default",
    "SET param_x = 1",
    "USE system",
    "USE runstream",
    "KILL QUERY WHERE 1 SYNC",
    "KILL MUTATION WHERE 1",
    "SYSTEM SHUTDOWN",
    "SYSTEM FLUSH LOGS",
    "SYSTEM DROP MARK CACHE",
    "SYSTEM STOP MERGES runstream.points",
    "BACKUP DATABASE runstream TO Disk('x', 'y')",
    "RESTORE DATABASE runstream FROM File('/tmp/x')",
    "CHECK TABLE points",
    "BEGIN TRANSACTION",
    "EXECUTE AS default SELECT 1",
    "MOVE USER u TO x",
    "COPY points TO '/tmp/x'",
    "EXPLAIN INSERT INTO points SELECT * FROM points",
    "SELECT 1 PARALLEL WITH SELECT 2",
    "SELECT 1 PARALLEL WITH INSERT INTO points SELECT * FROM points",
    # Several statements, settings, files to write, formats that read files.
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE points",
    "SELECT 1;\n\nSET ROLE runstream_writer",
    "SELECT 1 SETTINGS max_threads = 1",
    "SELECT 1 SETTINGS readonly = 0",
    "SELECT * FROM (SELECT 1 SETTINGS max_memory_usage = 0)",
    "SELECT 1 INTO OUTFILE '/tmp/x'",
    "SELECT 1 INTO OUTFILE '/tmp/x' FORMAT CSV",
    "SELECT 1 INTO OUTFILE '/tmp/x' APPEND",
    "SELECT 1 INTO OUTFILE '/tmp/x' TRUNCATE AND STDOUT",
    "SELECT 1 FORMAT Template",
    "SELECT 1 FORMAT TemplateIgnoreSpaces",
    "SELECT 1 FORMAT Protobuf",
    "SELECT 1 FORMAT CapnProto",
    "SELECT 1 FORMAT Npy",
    "SELECT 1 FORMAT NoSuchFormat",
    "SELECT formatRow('Template', 1)",
    "SELECT formatRowNoNewline('Template', 1)",
    # Secrets of the server, waiting, network, other programs.
    "SELECT sleep(3)",
    "SELECT sleepEachRow(3) FROM numbers(100)",
    "SELECT sleepOrNull(3)",
    "SELECT getServerSetting('path')",
    "SELECT getMacro('x')",
    "SELECT filesystemAvailable()",
    "SELECT filesystemCapacity('default')",
    "SELECT getClientHTTPHeader('Authorization')",
    "SELECT currentRequestURL()",
    "SELECT showCertificate()",
    "SELECT addressToLine(1)",
    "SELECT demangle('x')",
    "SELECT catboostEvaluate('/etc/passwd', 1)",
    "SELECT naiveBayesClassifier('x', 'y')",
    "SELECT aiGenerate('x')",
    "SELECT AIGenerate('x')",
    "SELECT regionToName(toUInt32(1))",
    "SELECT FQDN()",
    "SELECT serverUUID()",
    "SELECT logTrace('x')",
    "SELECT noSuchFunction(1)",
    "SELECT `no such function`(1)",
    # Not SQL at all.
    "",
    ";",
    "SELECT",
    "SELECT 1 FROM",
    "optimize = 1 SELECT 1",
    "AST SELECT 1",
    "\0SELECT 1",
    "SELECT 1\0",
    "SELECT '" + "x" * 1_000_001 + "'",
]

HONEST = [
    "SELECT 1",
    "select 1;",
    "  -- a remark\nSELECT /* another */ 1 FORMAT JSON",
    "SELECT 1 FORMAT Native",
    "SELECT version(), timezone()",
    "SELECT displayName(), version(), revision(), timezone()",
    "SELECT currentUser(), currentDatabase(), hostName()",
    "SELECT * FROM runs",
    "SELECT * FROM runstream.runs WHERE status = 'RUNNING' ORDER BY started_at DESC LIMIT 50",
    "SELECT * FROM `runstream`.`runs` AS r",
    "SELECT r.run_id, p.value FROM runs AS r LEFT JOIN params AS p ON p.run_id = r.run_id AND p.key = 'lr'",
    "SELECT r.* FROM runs r ANY LEFT JOIN latest_metrics m USING (run_id) WHERE m.key = 'loss' AND m.value < 0.1",
    "SELECT * EXCEPT (artifact_uri) FROM runs",
    "SELECT * REPLACE (upper(status) AS status) FROM runs",
    "SELECT COLUMNS('^run') FROM runs",
    "WITH best AS (SELECT run_id, min(value) AS v FROM metrics WHERE key = 'loss' GROUP BY run_id) "
    "SELECT runs.name, best.v FROM best JOIN runs USING (run_id) ORDER BY v LIMIT 10",
    "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t WHERE n < 5) SELECT sum(n) FROM t",
    "WITH 5 AS n SELECT n * 2",
    "WITH (SELECT max(step) FROM metrics) AS last SELECT last",
    "SELECT run_id, quantile(0.5)(value), quantiles(0.1, 0.9)(value), quantileTDigestIf(0.9)(value, step > 10) "
    "FROM metrics GROUP BY run_id",
    "SELECT lttb(500)(step, value) FROM metrics WHERE run_id = {run:String} AND key = 'loss'",
    "SELECT largestTriangleThreeBuckets(500)(step, value) FROM points WHERE run_id = 'x'",
    "SELECT intDiv(step, 100) AS b, avg(value), min(value), max(value) FROM metrics GROUP BY b ORDER BY b",
    "SELECT run_id, key, argMax(value, step), argMaxIf(value, step, isFinite(value)) FROM metrics GROUP BY run_id, key",
    "SELECT value, avg(value) OVER (PARTITION BY run_id, key ORDER BY step ROWS BETWEEN 9 PRECEDING AND CURRENT ROW) "
    "FROM metrics",
    "SELECT row_number() OVER w, lagInFrame(value) OVER w FROM metrics WINDOW w AS (PARTITION BY run_id ORDER BY step)",
    "SELECT rank() OVER (ORDER BY value DESC) AS r FROM latest_metrics QUALIFY r <= 3",
    "SELECT arrayMap(x -> x * 2, [1, 2, 3]), arrayFilter((x, y) -> x > y, [1, 2], [0, 5])",
    "SELECT arrayMap(abs, [-1, 2]), arraySort(x -> -x, [1, 2, 3]), arrayFold((a, x) -> a + x, [1, 2], toInt64(0))",
    "SELECT arrayJoin([1, 2, 3]) AS x, x * 2",
    "SELECT * FROM numbers(10)",
    "SELECT number FROM numbers_mt(10) WHERE number % 2 = 0",
    "SELECT groupArray((step, value)) FROM metrics GROUP BY run_id, key",
    "SELECT groupArraySorted(10)(value), groupUniqArray(key), topK(3)(key), uniqExact(run_id) FROM metrics",
    "SELECT sumMap(map('a', 1)), maxMap(map('a', 2)), sumForEach([1, 2]), avgOrNull(value), "
    "countIf(value > 0) FROM metrics",
    "SELECT tags['mlflow.runName'] FROM experiments",
    "SELECT mapKeys(tags), mapContains(tags, 'a') FROM experiments ARRAY JOIN mapKeys(tags) AS k",
    "SELECT (1, 'a').1, tuple(1, 2) = (1, 2), [1, 2][1], (SELECT 1), -1, 1.5e3, NULL, true, NOT false",
    "SELECT CAST(value AS Float32), value::String, toInt64('5'), CAST('1' AS Nullable(UInt8)) FROM params",
    "SELECT toFloat64OrNull(value), JSONExtractFloat(value, 'a'), JSON_VALUE(value, '$.a') FROM params",
    "SELECT now() - INTERVAL 7 DAY, toStartOfInterval(timestamp, INTERVAL 5 MINUTE), date '2024-01-01' FROM metrics",
    "SELECT dateDiff('second', started_at, ended_at), formatDateTime(started_at, '%F %T') FROM runs",
    "SELECT if(value > 0, 'a', 'b'), multiIf(value > 1, 1, value > 0, 2, 3), CASE WHEN value > 0 THEN 1 ELSE 0 END, "
    "CASE key WHEN 'a' THEN 1 ELSE 2 END FROM metrics",
    "SELECT coalesce(NULL, 1), ifNull(NULL, 2), isNaN(value), isNull(value), value IS NOT NULL FROM metrics",
    "SELECT * FROM metrics WHERE run_id IN (SELECT run_id FROM runs WHERE status = 'FINISHED') AND key LIKE 'val%'",
    "SELECT * FROM metrics WHERE run_id IN ('a', 'b') AND step BETWEEN 1 AND 10 AND NOT key ILIKE '%x%'",
    "SELECT * FROM metrics WHERE (run_id, key) IN (('a', 'b'), ('c', 'd'))",
    "SELECT * FROM metrics WHERE run_id GLOBAL IN (SELECT run_id FROM runs)",
    "SELECT * FROM metrics WHERE exists(SELECT 1 FROM runs)",
    "SELECT 1 UNION ALL SELECT 2 UNION DISTINCT SELECT 3",
    "SELECT 1 INTERSECT SELECT 1 EXCEPT SELECT 2",
    "SELECT DISTINCT key FROM metrics ORDER BY key LIMIT 10 OFFSET 5",
    "SELECT DISTINCT ON (run_id) run_id, value FROM metrics ORDER BY run_id, step DESC",
    "SELECT * FROM metrics ORDER BY step DESC NULLS LAST LIMIT 1 BY run_id, key LIMIT 5 WITH TIES",
    "SELECT step, value FROM metrics ORDER BY step WITH FILL FROM 0 TO 10 STEP 1 INTERPOLATE (value AS value)",
    "SELECT key, count() FROM metrics GROUP BY key WITH TOTALS HAVING count() > 1",
    "SELECT key, run_id, count() FROM metrics GROUP BY ROLLUP(key, run_id)",
    "SELECT key, run_id, count() FROM metrics GROUP BY GROUPING SETS ((key), (run_id))",
    "SELECT key, run_id, count(), grouping(key) FROM metrics GROUP BY CUBE(key, run_id)",
    "SELECT run_id, key, value FROM points FINAL PREWHERE key = 'loss' WHERE value > 0",
    "SELECT run_id, key, last.value FROM (SELECT run_id, key, last FROM rollup FINAL)",
    "SELECT * FROM ingest_positions FINAL",
    "SELECT stream, partition, max(next_offset) FROM ingest_positions GROUP BY stream, partition",
    "SELECT * FROM rejects",
    "SELECT value FROM settings FINAL WHERE name = 'artifact_root'",
    "SELECT * FROM run_facts FINAL",
    "SELECT * FROM param_facts, run_tag_facts LIMIT 1",
    "SELECT count() FROM system.one",
    "SELECT a.value - b.value FROM metrics a ASOF JOIN metrics b ON a.run_id = b.run_id AND a.step >= b.step",
    "SELECT * FROM runs CROSS JOIN (SELECT 1 AS one) AS o",
    "SELECT k, v FROM (SELECT ['a'] AS ks, [1] AS vs) ARRAY JOIN ks AS k, vs AS v",
    "SELECT * FROM (SELECT 1 AS a) LEFT ARRAY JOIN [1, 2] AS x",
    "SELECT 'FORMAT CSV', 'file(''/etc/passwd'')', '; DROP TABLE points', '-- x', 'SETTINGS a = 1'",
    'SELECT "name" AS `a b`, name AS "x.y" FROM runs',
    "SELECT user, source_name, name, source_version FROM runs",
    "SELECT * FROM {table:Identifier} LIMIT 1",
    "SELECT {n:Int64} + 1, {names:Array(String)}, {when:DateTime64(3)}",
    "SELECT match(key, '^val/.*'), extract(key, '(\\\\d+)'), splitByChar('/', key)[1], position(key, 'x'), "
    "replaceRegexpAll(key, 'a', 'b'), concat(key, '-', run_id), key || run_id, lower(key), "
    "substring(key, 1, 3) FROM metrics",
    "SELECT corr(a.value, b.value), covarPop(a.value, b.value), simpleLinearRegression(a.step, a.value), "
    "stddevPop(a.value) "
    "FROM metrics a JOIN metrics b USING (run_id, step)",
    "SELECT exponentialMovingAverage(10)(value, step), deltaSum(value), boundingRatio(step, value), "
    "skewPop(value) FROM metrics",
    "SELECT histogram(10)(value), bar(1, 0, 10, 5), any(cityHash64(run_id)), max(hex(MD5(run_id))), "
    "rand() FROM metrics",
    "SELECT width_bucket(value, 0, 1, 10), roundBankers(value, 2), floor(value), log10(value), "
    "greatest(1, 2) FROM metrics",
    "SELECT lagInFrame(value) OVER (ORDER BY step) FROM metrics",
    "SELECT untuple((1, 2)), dictionary_like FROM (SELECT 1 AS dictionary_like)",
    "SHOW TABLES",
    "SHOW TABLES LIKE 'run%'",
    "SHOW DATABASES",
    'SHOW TABLES FROM "runstream"',
    'DESC TABLE "runstream"."runs"',
    "SELECT name, type, table FROM system.columns WHERE database IN ('runstream') AND table = 'runs'",
    "SELECT name, type, table FROM system.columns",
    "SELECT database, name, engine, comment FROM system.tables WHERE database = 'runstream'",
    "SELECT t.name, d.engine FROM system.tables t JOIN system.databases d "
    "ON system.tables.database = system.databases.name WHERE t.name LIKE '%'",
    "SELECT 'x' IN (SELECT name FROM system.tables)",
    "SELECT name, is_aggregate, case_insensitive, alias_to, origin, description, syntax, arguments, returned_value, "
    "examples, categories FROM system.functions LIMIT 10000",
    'SELECT DISTINCT arrayJoin(tags.keys) AS keys FROM "runstream"."experiments" LIMIT 1000',
    "SELECT * FROM system.data_type_families",
    "SHOW CREATE TABLE points",
    "SHOW CREATE VIEW runs",
    "DESCRIBE runs",
    "DESCRIBE TABLE runstream.metrics FORMAT JSON",
    "DESCRIBE (SELECT 1 AS x)",
    "DESC metrics",
    "EXISTS TABLE runs",
    "EXPLAIN SELECT * FROM metrics",
    "EXPLAIN PLAN SELECT * FROM metrics",
    "EXPLAIN indexes = 1 SELECT * FROM metrics WHERE run_id = 'x'",
    "EXPLAIN PIPELINE SELECT * FROM metrics",
    "EXPLAIN ESTIMATE SELECT * FROM points",
    "EXPLAIN SYNTAX SELECT * FROM metrics",
    "EXPLAIN AST SELECT * FROM metrics",
    "(SELECT 1)",
    "FROM runs SELECT run_id",
]

PARAMETERS = {
    "run": "x",
    "n": "1",
    "names": "['a']",
    "when": "2024-01-01 00:00:00.000",
    "table": "runs",
    "t": "system.tables",
    "d": "system",
    "path": "data_paths",
    "f": "file",
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What the gate said to every statement, the engine's own answer to the honest ones, and its function list."""
    folder = tmp_path_factory.mktemp("gate")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: dict[str, dict[str, object]] = json.loads(done.stdout)
    return answers


def test_hostile_statements_are_refused(verdicts: dict[str, dict[str, object]]) -> None:
    """The gate alone, without role, readonly and Landlock behind it, lets no hostile statement through."""
    let_through = [sql for sql, verdict in zip(HOSTILE, verdicts["hostile"], strict=True) if verdict is None]
    assert not let_through, "\n".join(let_through)
    assert len(HOSTILE) > 200


def test_honest_statements_pass_and_run(verdicts: dict[str, dict[str, object]]) -> None:
    """Analytic SQL is neither refused by the gate nor by the role and the settings behind it."""
    refused = {sql: verdict for sql, verdict in zip(HONEST, verdicts["honest"], strict=True) if verdict is not None}
    assert not refused, "\n".join(f"{sql}\n    {verdict}" for sql, verdict in refused.items())


def test_every_function_of_the_engine_is_judged(verdicts: dict[str, dict[str, object]]) -> None:
    """A new engine's new functions must be read and put in one of the two lists."""
    assert verdicts["functions"] == {"unjudged": [], "gone": [], "both": []}


def test_gated_statements_do_not_escape_the_role(verdicts: dict[str, dict[str, object]]) -> None:
    """Without the gate, role and readonly alone still refuse what writes, rules, or reads another database."""
    assert verdicts["role_alone"] == []


class CountingSession:
    """A session whose parse of anything is a SELECT of a literal."""

    def __init__(self) -> None:
        self.parsed = 0

    def classify(self, _: str) -> Classification:
        return Classification("READ_ONLY", 1)

    def query(self, *_: object) -> Chunk:
        self.parsed += 1
        return Chunk(b"SelectWithUnionQuery (children 1)\n Literal 1", 1)


@pytest.mark.parametrize(
    ("sql", "parses"),
    [
        ("SELECT 1 FROM runs WHERE run_id = {x:String}", 1),
        ("SELECT 1 FROM runs WHERE run_id IN {x:Array(String)}", 1),
        ("SELECT 1 FROM {x:Identifier}", 2),
        ("SELECT 1 FROM { x : iDENTIFIER }", 2),
        ("SELECT {x:String} FROM {x:Identifier}", 2),
        ("SELECT {x:String} FROM {x:`Ident\\x69fier`}", 2),
        ("SELECT 1 FROM runs", 2),
    ],
)
def test_a_verdict_is_remembered_without_values_that_cannot_be_names(sql: str, parses: int) -> None:
    """The same statement about another run is not parsed again; a value that may name a table always is."""
    memory, session = gate.Memory(), CountingSession()
    for value in ("a", "b"):
        memory.check(session, sql, {"x": value})  # type: ignore[arg-type]
    assert session.parsed == parses


def _program(folder: Path) -> None:
    from runstream_ingest.local.engine import Engine, Role
    from runstream_ingest.local.errors import EngineQueryError
    from runstream_ingest.local.store import ChdbStore
    from runstream_ingest.migration import migrate

    engine = Engine(folder)
    migrate(ChdbStore(engine))
    settings = gate.SettingsPolicy().apply({})

    def gated(sql: str, role: Role) -> str | None:
        session = engine.session(role, settings=settings if role is Role.READER else None)
        try:
            approved = gate.check(session, sql, PARAMETERS)
            if role is Role.READER:
                session.query(approved.sql, approved.format or "TSV", PARAMETERS)
        except EngineQueryError as exc:
            return str(exc)[:300]
        finally:
            session.close()
        return None

    def ungated(sql: str) -> str | None:
        session = engine.session(Role.READER, settings=settings)
        try:
            session.query(sql, "TSV", PARAMETERS)
        except EngineQueryError as exc:
            return str(exc)[:300]
        finally:
            session.close()
        return None

    session = engine.session(Role.WRITER)
    names = set(session.query("SELECT name FROM system.functions", "TSVRaw").data.decode().split())
    session.close()
    allowed, denied = gate._functions(), gate._forbidden_functions()
    lowered = {name.lower() for name in names}
    ruling = (
        "INSERT",
        "CREATE",
        "DROP",
        "TRUNCATE",
        "ALTER",
        "DELETE",
        "UPDATE",
        "OPTIMIZE",
        "RENAME",
        "SYSTEM",
        "GRANT",
    )
    print(
        json.dumps(
            {
                # With the writer's rights, so that the gate alone decides.
                "hostile": [gated(sql, Role.WRITER) for sql in HOSTILE],
                "honest": [gated(sql, Role.READER) for sql in HONEST],
                "functions": {
                    "unjudged": sorted(lowered - allowed - denied),
                    "gone": sorted((allowed | denied) - lowered),
                    "both": sorted(allowed & denied),
                },
                "role_alone": [sql for sql in HOSTILE if sql.startswith(ruling) and ungated(sql) is None],
            }
        )
    )
    engine.close()


if __name__ == "__main__":
    _program(Path(sys.argv[1]))
