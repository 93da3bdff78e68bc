"""Energy: the joules that a machine's own counters say a run took, by source; nothing where the machine does not tell.

Processors: RAPL (Intel and AMD) as Linux shows it under /sys/class/powercap, which most machines let only root read.
GPUs: NVML's total energy. Both count the whole package or GPU, whatever else ran on it meanwhile.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
# A processor's counter starts over after some 260 kJ: twenty minutes at 200 W. It must be read more often than that.
READ_EVERY = 60.0


@dataclass
class Counter:
    """A source's joules since some moment, as read() gives them (None: not now), and the value, if there is one, after
    which the source starts over at 0."""

    source: str
    read: Callable[[], float | None]
    span: float | None = None


class Meter:
    """What some counters have counted since it was made, and what was used before by the same piece of work."""

    def __init__(self, counters: list[Counter]) -> None:
        first = [(counter, counter.read()) for counter in counters]
        self._last = [(counter, value) for counter, value in first if value is not None]
        self._joules = {counter.source: 0.0 for counter, _ in self._last}
        self._lock = threading.Lock()

    @property
    def tells(self) -> bool:
        """Whether any source could be read."""
        return bool(self._last)

    def add(self, joules: dict[str, float]) -> None:
        """Count what an earlier piece of this work used, by source."""
        with self._lock:
            for source, used in joules.items():
                self._joules[source] = self._joules.get(source, 0.0) + used

    def read(self) -> dict[str, float] | None:
        """Joules by source until now; None where no source tells."""
        with self._lock:
            self._last = [(counter, self._counted(counter, last)) for counter, last in self._last]
            return {source: round(used, 3) for source, used in sorted(self._joules.items())} or None

    def _counted(self, counter: Counter, last: float) -> float:
        """Add what a source has counted since its last value. Returns the new one."""
        now = counter.read()
        if now is None:
            return last
        # A counter without a span that falls was set back to 0, by a reloaded driver.
        self._joules[counter.source] += now - last if now >= last else now + (counter.span or last) - last
        return now


_meter: Meter | None = None  # of the verb that runs


@contextmanager
def metering(gpus: list[str]) -> Iterator[None]:
    """Count the energy of a block, on the processors and on the GPUs of those NVML UUIDs; `used` tells it."""
    global _meter
    with _nvml(gpus) as nvml:
        _meter = meter = Meter([*processor_counters(POWERCAP), *gpu_counters(nvml, gpus)])
        ended = threading.Event()
        if meter.tells:
            threading.Thread(target=_keep_reading, args=(meter, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            _meter = None


def used() -> dict[str, float] | None:
    """Joules by source since `metering` began, earlier pieces of the work included; None where no source tells."""
    return None if _meter is None else _meter.read()


def add_earlier(joules: dict[str, float] | None) -> None:
    """Count what the earlier pieces of a resumed work had used."""
    if _meter is not None and joules:
        _meter.add(joules)


def _keep_reading(meter: Meter, ended: threading.Event) -> None:
    while not ended.wait(READ_EVERY):
        meter.read()


# --- processors


def processor_counters(folder: Path) -> list[Counter]:
    """The packages, and their memory where it is counted apart, that this user may read."""
    zones = sorted(folder.glob("intel-rapl:*"), key=lambda path: path.name)
    found = [_zone_counter(zone, folder) for zone in zones]
    return [counter for counter in found if counter is not None]


def _zone_counter(zone: Path, folder: Path) -> Counter | None:
    """A zone's counter. Cores and graphics are parts of their package, and psys is all packages: they would count
    twice."""
    try:
        name = (zone / "name").read_text().strip()
        span = int((zone / "max_energy_range_uj").read_text()) / 1e6
        part_of = zone.name.rsplit(":", 1)[0] if zone.name.count(":") == 2 else None
        if part_of is not None:
            name = f"{(folder / part_of / 'name').read_text().strip()} {name}"
    except (OSError, ValueError):
        return None
    if not name.startswith("package") or (part_of is not None and not name.endswith(" dram")):
        return None
    return Counter(name, lambda: _microjoules(zone / "energy_uj"), span)


def _microjoules(path: Path) -> float | None:
    """A counter's value in joules; None for who may not read it."""
    try:
        return int(path.read_text()) / 1e6
    except (OSError, ValueError):
        return None


# --- GPUs


@contextmanager
def _nvml(gpus: list[str]) -> Iterator[Any]:
    """NVML, or None where there are no GPUs or no driver that tells."""
    if not gpus:
        yield None
        return
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def gpu_uuids(index: int | None) -> list[str]:
    """The UUID, as NVML writes it, of the GPU with that index, or of every visible one."""
    import torch

    indices = range(torch.cuda.device_count()) if index is None else [index]
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in indices]


def gpu_counters(nvml: Any, gpus: list[str]) -> list[Counter]:
    """The energy of each GPU by its UUID, where NVML counts it (since Volta); nvml: the module pynvml, or None."""
    counters = []
    for uuid in gpus if nvml is not None else []:
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError:
            continue
        counters.append(Counter(uuid, lambda handle=handle: _millijoules(nvml, handle)))  # type: ignore[misc]
    return counters


def _millijoules(nvml: Any, handle: Any) -> float | None:
    """A GPU's counter in joules; None for one that has none."""
    try:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except nvml.NVMLError:
        return None
