"""CPU, memory, disk, network and GPU of the machine as metrics of a run, under MLflow's names (`system/...`).

Off by default. One daemon thread per run samples; it never raises into the program, and a forked child has none.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from .errors import InvalidInputError
from .validation import check_key

__all__ = [
    "GpuProbe",
    "HostProbe",
    "Probe",
    "SystemMetrics",
    "SystemMetricsSettings",
    "default_probes",
    "settings_from_environment",
]

_LOG = logging.getLogger("runstream.system_metrics")
PREFIX: Final = "system/"
_MEGABYTE: Final = 1e6


class Probe(Protocol):
    """One source of readings. Called from the sampling thread alone."""

    def read(self) -> Mapping[str, float]:
        """Readings now, by metric name without the prefix."""
        ...

    def close(self) -> None:
        """Release what was opened."""
        ...


@dataclass(frozen=True, slots=True)
class SystemMetricsSettings:
    """How system metrics are sampled."""

    interval_seconds: float = 10.0
    """Between two samples."""
    samples_before_logging: int = 1
    """So many samples are averaged into one point."""
    node_id: str = ""
    """Put between prefix and name (`system/<node>/...`) where several machines log to one run."""
    first_step: int = 0
    """Step of the first point; a resumed run goes on behind its earlier ones."""

    def __post_init__(self) -> None:
        if not self.interval_seconds > 0:
            raise ValueError(f"interval_seconds must be positive, not {self.interval_seconds!r}")
        if self.samples_before_logging < 1:
            raise ValueError(f"samples_before_logging must be at least 1, not {self.samples_before_logging!r}")


def settings_from_environment(changes: Mapping[str, Any]) -> SystemMetricsSettings:
    """Settings of RUNSTREAM_SYSTEM_METRICS_SAMPLING_INTERVAL (seconds), ..._SAMPLES_BEFORE_LOGGING and ..._NODE_ID.

    Args:
        changes: fields that a call has set; they go before the environment.

    Raises:
        InvalidInputError: a value does not fit.
    """
    fields: dict[str, Any] = {}
    for field, name, kind in (
        ("interval_seconds", "RUNSTREAM_SYSTEM_METRICS_SAMPLING_INTERVAL", float),
        ("samples_before_logging", "RUNSTREAM_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", int),
        ("node_id", "RUNSTREAM_SYSTEM_METRICS_NODE_ID", str),
    ):
        text = os.environ.get(name)
        if text:
            try:
                fields[field] = kind(text)
            except ValueError as exc:
                raise InvalidInputError(f"{name} is {text!r}: give a number") from exc
    try:
        settings = SystemMetricsSettings(**{**fields, **changes})
    except (ValueError, TypeError) as exc:
        raise InvalidInputError(f"system metrics: {exc}") from exc
    if settings.node_id:
        check_key("node id of system metrics", settings.node_id)
    return settings


class HostProbe:
    """CPU, memory, disk and network through psutil. Disk is that of the working directory."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        psutil.cpu_percent(None)  # the first reading is the base of the second
        self._network = psutil.net_io_counters()
        self._disk = str(Path.cwd())

    def read(self) -> Mapping[str, float]:
        psutil = self._psutil
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(self._disk)
        found = {
            "cpu_utilization_percentage": float(psutil.cpu_percent(None)),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": float(disk.percent),
            "disk_usage_megabytes": disk.used / _MEGABYTE,
            "disk_available_megabytes": disk.free / _MEGABYTE,
        }
        network = psutil.net_io_counters()
        if network is not None and self._network is not None:  # None where a sandbox hides the counters
            found["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / _MEGABYTE
            found["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / _MEGABYTE
        return found

    def close(self) -> None:
        pass


class GpuProbe:
    """Every NVIDIA GPU of the machine through NVML. Making one raises where there is no NVML or no GPU."""

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        self._devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]

    def read(self) -> Mapping[str, float]:
        nvml, found = self._nvml, dict[str, float]()
        for index, device in enumerate(self._devices):
            name = f"gpu_{index}_"
            # Virtual and partitioned GPUs lack one counter or another; each is worth having alone.
            memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, device)
            if memory is not None and memory.total:
                found[f"{name}memory_usage_percentage"] = memory.used / memory.total * 100
                found[f"{name}memory_usage_megabytes"] = memory.used / _MEGABYTE
            use = self._ask(nvml.nvmlDeviceGetUtilizationRates, device)
            if use is not None:
                found[f"{name}utilization_percentage"] = float(use.gpu)
            power = self._ask(nvml.nvmlDeviceGetPowerUsage, device)
            if power is not None:
                found[f"{name}power_usage_watts"] = power / 1e3
                limit = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, device)
                if limit:
                    found[f"{name}power_usage_percentage"] = power / limit * 100
        return found

    def close(self) -> None:
        self._ask(self._nvml.nvmlShutdown)

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None


def default_probes() -> list[Probe]:
    """The host's probe, and the GPUs' where NVML finds some."""
    probes: list[Probe] = [HostProbe()]
    try:
        probes.append(GpuProbe())
    except ImportError:
        _LOG.debug('no GPU metrics: NVML is not installed (pip install "runstream[gpu]")')
    except Exception as exc:  # pynvml raises one class per cause: no driver, no permission, no device
        _LOG.debug("no GPU metrics: %s", exc)
    return probes


class SystemMetrics:
    """Samples until `stop`. `log(metrics, step)` is called from its own thread."""

    def __init__(
        self,
        log: Callable[[Mapping[str, float], int], None],
        settings: SystemMetricsSettings,
        probes: Callable[[], list[Probe]] = default_probes,
    ) -> None:
        self._log, self._settings, self._make_probes = log, settings, probes
        self._pid = os.getpid()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="runstream-system-metrics", daemon=True)
        self._step = settings.first_step

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float = 2.0) -> None:
        """Log what has been sampled and end the thread; blocks until it is gone or the time is up."""
        if self._pid != os.getpid():  # the thread stayed in the parent; the child inherits only this object
            return
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)

    def _work(self) -> None:
        probes: list[Probe] = []
        try:
            probes = self._make_probes()
            sums: dict[str, list[float]] = {}
            samples = 0
            while True:
                last = self._stop.wait(self._settings.interval_seconds)
                for probe in probes:
                    for name, value in probe.read().items():
                        sums.setdefault(name, []).append(value)
                samples += 1
                if samples >= self._settings.samples_before_logging or last:
                    self._emit(sums)
                    sums, samples = {}, 0
                if last:
                    return
        except Exception as exc:
            if not sys.is_finalizing():
                _LOG.warning("system metrics have stopped: %s: %s", type(exc).__name__, exc)
        finally:
            for probe in probes:
                probe.close()

    def _emit(self, sums: Mapping[str, list[float]]) -> None:
        node = f"{self._settings.node_id}/" if self._settings.node_id else ""
        values = {f"{PREFIX}{node}{name}": sum(found) / len(found) for name, found in sums.items() if found}
        if values:
            self._log(values, self._step)
            self._step += 1
