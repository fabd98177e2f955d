-- A whole Kafka record batch of metric bodies as one row. Kafka writes lengths as Avro does (zigzag varints), so its
-- records are Avro records as they lie there: a few numbers and the key, the body's own fields, the header. The worker
-- puts place and time in front and a mark behind, and touches no single record.
-- A body that is longer or shorter than its schema says shifts everything behind it. unsound finds that out: the header
-- must stand behind every body, offsets must count from 0, and the mark must follow the last one. Where it does not hold,
-- the insert fails and the worker sends the same records one body a block. (A CONSTRAINT would print the data.)
-- The tuple has exactly the fields of the writer's schema, metric_batch.v1; plain strings decode a third faster here.
CREATE TABLE IF NOT EXISTS landing_metric_block
(
    log_partition Int32, log_offset Int64, log_time Int64, log_time_step Int64,
    trailer FixedString(27),
    records Array(Tuple(
        length Int64, attributes Int64, timestamp_delta Int64, offset_delta Int64, record_key String, body_length Int64,
        run_id String, writer Int64, first_seq Int64, sent_at Int64,
        keys Array(String), steps Array(Int64), times Array(Int64),
        ki Array(Int32), ci Array(Int32), values Array(Float64), seqs Array(Int64),
        trailer FixedString(27))),
    log_mark Int64,
    unsound UInt8 MATERIALIZED throwIf(
        log_mark != 1381192526 OR records.offset_delta != range(length(records))
        OR arrayExists(found -> found != trailer, records.trailer), 'a body is longer or shorter than its schema says')
)
ENGINE = Null;

CREATE MATERIALIZED VIEW IF NOT EXISTS landing_metric_block_records TO landing_metric_batch AS
SELECT
    log_partition, log_offset + record.offset_delta AS log_offset,
    log_time + log_time_step * record.timestamp_delta AS log_time, log_mark,
    record.run_id AS run_id, record.writer AS writer, record.first_seq AS first_seq, record.sent_at AS sent_at,
    record.keys AS keys, record.steps AS steps, record.times AS times,
    record.ki AS ki, record.ci AS ci, record.values AS values, record.seqs AS seqs
FROM landing_metric_block
ARRAY JOIN records AS record;

-- A copy without views: an insert decodes and checks, and keeps nothing.
CREATE TABLE IF NOT EXISTS probe_metric_block AS landing_metric_block ENGINE = Null;
