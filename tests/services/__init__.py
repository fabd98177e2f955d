"""Real services for tests, benchmarks and the local demo: Apache Kafka, S3 and the store, on loopback.

Each is taken from the first of: an address in the environment (RUNSTREAM_TEST_KAFKA, RUNSTREAM_TEST_S3,
RUNSTREAM_TEST_CLICKHOUSE), Docker through testcontainers, a local binary. `used` remembers which one it was.
"""
