-- The newest point of each series once more, ordered by key: a page of runs that is filtered or sorted by a metric reads
-- that metric of all runs and nothing else (by the order of rollup it would read every metric of every run).
CREATE TABLE IF NOT EXISTS rollup_by_key
(
    key LowCardinality(String) CODEC(ZSTD(1)),
    run_id String CODEC(ZSTD(1)),
    last SimpleAggregateFunction(max, Tuple(step Int64, timestamp DateTime64(3, 'UTC'), value Float64, is_nan UInt8))
)
ENGINE = AggregatingMergeTree
ORDER BY (key, run_id);

CREATE MATERIALIZED VIEW IF NOT EXISTS rollup_keys TO rollup_by_key AS
SELECT key, run_id, last FROM rollup;

INSERT INTO rollup_by_key (key, run_id, last) SELECT key, run_id, max(last) FROM rollup GROUP BY key, run_id;
