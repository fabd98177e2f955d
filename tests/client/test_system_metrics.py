"""System metrics: names and units, averaging, stopping, and trouble that stays out of the program."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping

import pytest

from runstream.system_metrics import HostProbe, Probe, SystemMetrics, SystemMetricsSettings, default_probes

HOST = {
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
    "disk_usage_megabytes",
    "disk_available_megabytes",
    "network_receive_megabytes",
    "network_transmit_megabytes",
}


class CountingProbe:
    """Readings 1, 2, 3 ..."""

    def __init__(self, fail_at: int = -1) -> None:
        self.count = 0
        self.closed = False
        self.fail_at = fail_at
        self.thread = ""

    def read(self) -> Mapping[str, float]:
        self.count += 1
        self.thread = threading.current_thread().name
        if self.count == self.fail_at:
            raise RuntimeError("sensor on fire")
        return {"x": float(self.count)}

    def close(self) -> None:
        self.closed = True


class Log:
    """Collects points and lets a test wait for them."""

    def __init__(self) -> None:
        self.points: list[tuple[dict[str, float], int]] = []
        self.changed = threading.Condition()

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        with self.changed:
            self.points.append((dict(metrics), step))
            self.changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.points) >= count, 30)


def only(probe: Probe) -> Callable[[], list[Probe]]:
    return lambda: [probe]


def test_the_host_has_mlflows_names() -> None:
    """CPU, memory, disk and network, in percent and megabytes."""
    probe = HostProbe()
    found = probe.read()
    probe.close()
    assert set(found) <= HOST
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"} <= set(found)
    assert 0 <= found["system_memory_usage_percentage"] <= 100
    assert found["system_memory_usage_megabytes"] > 10


def test_a_machine_without_gpu_is_no_error() -> None:
    """There is always the host's probe; GPUs only where NVML finds some."""
    probes = default_probes()
    assert isinstance(probes[0], HostProbe)
    for probe in probes:
        probe.close()


def test_points_have_rising_steps_and_prefix() -> None:
    """Each point is one step further, under system/."""
    log, probe = Log(), CountingProbe()
    metrics = SystemMetrics(log, SystemMetricsSettings(interval_seconds=0.001), only(probe))
    metrics.start()
    log.wait_for(3)
    metrics.stop()
    assert log.points[:3] == [({"system/x": 1.0}, 0), ({"system/x": 2.0}, 1), ({"system/x": 3.0}, 2)]
    assert probe.closed
    assert probe.thread == "runstream-system-metrics"


def test_samples_are_averaged_and_nodes_named() -> None:
    """Several samples make one point; the node stands in the name."""
    log = Log()
    settings = SystemMetricsSettings(interval_seconds=0.001, samples_before_logging=4, node_id="node-7")
    metrics = SystemMetrics(log, settings, only(CountingProbe()))
    metrics.start()
    log.wait_for(1)
    metrics.stop()
    assert log.points[0] == ({"system/node-7/x": 2.5}, 0)


def test_stopping_early_still_gives_one_point() -> None:
    """A run shorter than the interval has a point, and stopping does not wait for the interval."""
    log = Log()
    metrics = SystemMetrics(log, SystemMetricsSettings(interval_seconds=3600), only(CountingProbe()))
    metrics.start()
    metrics.stop(timeout_seconds=30)
    assert log.points == [({"system/x": 1.0}, 0)]


def test_trouble_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A failing sensor ends the sampling with one line, and stop still works."""
    log, probe = Log(), CountingProbe(fail_at=2)
    metrics = SystemMetrics(log, SystemMetricsSettings(interval_seconds=0.001), only(probe))
    with caplog.at_level(logging.WARNING):
        metrics.start()
        metrics._thread.join(30)
    metrics.stop()
    assert caplog.text.count("sensor on fire") == 1
    assert probe.closed


def test_a_forked_child_samples_nothing_and_stops_at_once() -> None:
    """The thread stays in the parent; the child's stop returns."""
    log = Log()
    metrics = SystemMetrics(log, SystemMetricsSettings(interval_seconds=3600), only(CountingProbe()))
    metrics.start()
    pid = os.fork()
    if pid == 0:
        metrics.stop(timeout_seconds=60)
        os._exit(0 if not log.points and threading.active_count() == 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    metrics.stop(timeout_seconds=30)
    assert len(log.points) == 1


@pytest.mark.parametrize("settings", [{"interval_seconds": 0}, {"interval_seconds": -1}, {"samples_before_logging": 0}])
def test_settings_are_checked(settings: dict[str, int]) -> None:
    """Intervals and counts must be positive."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        SystemMetricsSettings(**settings)
