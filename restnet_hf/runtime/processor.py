"""Facts on this processor: its name, clock rate and temperature, where the system reports them. No torch."""

import platform
from pathlib import Path


CPUINFO = Path("/proc/cpuinfo")
CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
THERMAL = Path("/sys/class/thermal")
COLDEST, HOTTEST = -50.0, 200.0  # degrees Celsius: sensors that are not connected read more or less


def cpuinfo(key: str) -> list[str]:
    """The values that Linux lists for a property, one for each core; none on other systems."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key]


def processor_name() -> str:
    """Name of the processor, as the system reports it."""
    return [*cpuinfo("model name"), *cpuinfo("Model"), platform.processor() or platform.machine()][0]


def clock_mhz() -> float | None:
    """Current clock rate of the processor in MHz; None if the system does not report it."""
    if CPUFREQ.exists():
        return int(CPUFREQ.read_text()) / 1000  # kHz
    rates = [float(rate) for rate in cpuinfo("cpu MHz")]
    return max(rates) if rates else None


def temperature_c() -> float | None:
    """Temperature of the hottest sensor of the system in degrees Celsius; None if it reports none."""
    degrees = []
    for zone in THERMAL.glob("thermal_zone*/temp"):
        try:
            degrees.append(int(zone.read_text()) / 1000)
        except (OSError, ValueError):  # a sensor that is switched off
            continue
    return max((each for each in degrees if COLDEST < each < HOTTEST), default=None)
