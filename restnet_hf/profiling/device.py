"""Facts on this device: name, threads, clock rate, and energy where the system counts it."""

import datetime
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from restnet_hf.hashing import package_versions
from restnet_hf.runtime.processor import clock_mhz, processor_name


POWERCAP = Path("/sys/class/powercap")


def device_name(device: torch.device) -> str:
    """Name of the accelerator, or of the processor with the number of threads."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def device_facts() -> dict[str, Any]:
    """Machine, threads, clock rate (MHz, None if the system does not report it), date and versions."""
    return {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "clock_mhz": clock_mhz(),
        "date": datetime.date.today().isoformat(),
        "versions": package_versions(),
    }


def energy_counters(powercap: Path | None = None) -> dict[Path, int]:
    """Energy counters of the processor's packages (Intel RAPL), in microjoules; empty if none can be read.

    Many systems let only root read them.

    Args:
        powercap: folder of the counters; that of Linux by default.
    """
    counters = {}
    for domain in sorted((powercap or POWERCAP).glob("intel-rapl:*")):
        try:
            if (
                (domain / "name").read_text().startswith("package")
            ):  # parts of a package and the platform would count twice
                counters[domain] = int((domain / "energy_uj").read_text())
        except (OSError, ValueError):
            return {}
    return counters


def joules(run: Callable[[], object], seconds: float = 1.0, powercap: Path | None = None) -> float | None:
    """Energy of one run in joules, of all that the processor does meanwhile; None if the system does not count it.

    Args:
        run: function that is repeated.
        seconds: least time to repeat it for, as the counters move about once a millisecond.
        powercap: folder of the counters; that of Linux by default.
    """
    before = energy_counters(powercap)
    if not before:
        return None
    count, began = 0, time.perf_counter()
    while not count or time.perf_counter() - began < seconds:
        run()
        count += 1
    after = energy_counters(powercap)
    return sum(_used(domain, before, after) for domain in before) / count * 1e-6 if after else None


def _used(domain: Path, before: Mapping[Path, int], after: Mapping[Path, int]) -> int:
    """Microjoules between two readings; a full counter begins again at zero."""
    used = after[domain] - before[domain]
    return used if used >= 0 else used + int((domain / "max_energy_range_uj").read_text())
