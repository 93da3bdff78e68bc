"""Energy: counters that start over, that may not be read, that are not there."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from consistency import energy
from consistency.energy import Counter, Meter, add_earlier, gpu_counters, metering, processor_counters, used
from consistency.nets.denoiser import Denoiser
from consistency.training.ema import Ema
from consistency.training.loop import Training, train
from consistency.training.objectives import Denoising
from consistency.training.update import Update

SPAN = 1000 * 10**6  # microjoules


def zone(folder: Path, name: str, called: str, microjoules: int | str) -> Path:
    """A zone of a powercap tree; the kernel's are links in one flat folder."""
    path = folder / name
    path.mkdir(parents=True)
    (path / "name").write_text(f"{called}\n")
    (path / "max_energy_range_uj").write_text(f"{SPAN}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages with what the kernel shows beside them: cores, memory, the whole platform, another interface."""
    zone(tmp_path, "intel-rapl:0", "package-0", 990 * 10**6)
    zone(tmp_path, "intel-rapl:0:0", "core", 10)
    zone(tmp_path, "intel-rapl:0:1", "dram", 5 * 10**6)
    zone(tmp_path, "intel-rapl:1", "package-1", 100 * 10**6)
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1)
    return tmp_path


def test_packages_and_their_memory_are_counted_once(powercap: Path) -> None:
    found = {counter.source for counter in processor_counters(powercap)}
    assert found == {"package-0", "package-0 dram", "package-1"}


def test_a_counter_that_starts_over_goes_on(powercap: Path) -> None:
    meter = Meter(processor_counters(powercap))
    (powercap / "intel-rapl:0/energy_uj").write_text("20000000")
    (powercap / "intel-rapl:1/energy_uj").write_text("103500000")
    assert meter.read() == {"package-0": 30.0, "package-0 dram": 0.0, "package-1": 3.5}
    (powercap / "intel-rapl:0/energy_uj").write_text("10000000")
    assert meter.read()["package-0"] == 30.0 + 990.0


def test_a_counter_that_nobody_may_read_tells_nothing(powercap: Path) -> None:
    for path in powercap.glob("*/energy_uj"):
        path.unlink()  # for root, no permission would hinder it
        path.mkdir()
    meter = Meter(processor_counters(powercap))
    assert not meter.tells
    assert meter.read() is None


def test_a_machine_without_counters_tells_nothing(tmp_path: Path) -> None:
    assert Meter(processor_counters(tmp_path / "nowhere")).read() is None


class FakeNvml:
    """Two GPUs, of which one has no counter."""

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self) -> None:
        self.millijoules = {"GPU-a": 5000}

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid == "GPU-gone":
            raise self.NVMLError
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if handle not in self.millijoules:
            raise self.NVMLError
        return self.millijoules[handle]


def test_gpus_that_count_are_counted() -> None:
    nvml = FakeNvml()
    meter = Meter(gpu_counters(nvml, ["GPU-a", "GPU-old", "GPU-gone"]))
    nvml.millijoules["GPU-a"] = 7500
    assert meter.read() == {"GPU-a": 2.5}
    nvml.millijoules["GPU-a"] = 1000  # the driver was loaded again
    assert meter.read() == {"GPU-a": 3.5}


def test_each_gpu_has_its_own_counter() -> None:
    nvml = FakeNvml()
    nvml.millijoules["GPU-b"] = 0
    meter = Meter(gpu_counters(nvml, ["GPU-a", "GPU-b"]))
    nvml.millijoules["GPU-b"] = 4000
    assert meter.read() == {"GPU-a": 0.0, "GPU-b": 4.0}


def test_a_counter_that_fails_later_keeps_what_it_had() -> None:
    values: list[float | None] = [1.0, 3.0, None, 4.0]
    meter = Meter([Counter("x", lambda: values.pop(0))])
    assert [meter.read() for _ in range(3)] == [{"x": 2.0}, {"x": 2.0}, {"x": 3.0}]


def test_earlier_pieces_of_a_work_are_added(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", powercap)
    assert used() is None
    add_earlier({"package-0": 1.0})  # nothing is being counted: nothing happens
    with metering([]):
        add_earlier(None)
        add_earlier({"package-0": 10.0, "GPU-x": 2.0})
        (powercap / "intel-rapl:0/energy_uj").write_text("991000000")
        assert used() == {"GPU-x": 2.0, "package-0": 11.0, "package-0 dram": 0.0, "package-1": 0.0}
    assert used() is None


def test_a_resumed_training_counts_all_its_pieces(
    make_denoiser: Callable[..., Denoiser], powercap: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(energy, "POWERCAP", powercap)
    package = powercap / "intel-rapl:1/energy_uj"

    def trained(steps: int, microjoules: int) -> dict[str, float] | None:
        """Train to that step in a run of its own, while the processor uses so much."""
        with metering([]):
            package.write_text(str(int(package.read_text()) + microjoules))
            train(training(make_denoiser(), tmp_path / "state", steps))
            return used()

    first, second = trained(2, 3_000_000), trained(4, 4_000_000)
    assert first is not None and first["package-1"] == 3.0
    assert second is not None and second["package-1"] == 7.0


def training(model: Denoiser, folder: Path, steps: int) -> Training:
    """A training of a few steps on noise."""
    update = Update(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        objective=Denoising(model, -1.2, 1.2),
        batches=lambda step: (torch.zeros(4, 1, 4, 4), None),
        batch=4,
        part=4,
        seed=0,
        purpose="test",
    )
    return Training("test", "key", update, [Ema(model, 0.5)], steps, 1, folder)


def test_nvml_without_a_driver_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pynvml

    def fail(*words: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    with metering(["GPU-a"]):
        assert used() is None


def test_gpus_are_named_as_nvml_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"1234-{i}"))
    assert energy.gpu_uuids(None) == ["GPU-1234-0", "GPU-1234-1"]
    assert energy.gpu_uuids(1) == ["GPU-1234-1"]
