"""All costs of routes together."""

import datetime
import platform
from collections.abc import Sequence
from typing import Any

from restnet_hf.hashing import package_versions
from restnet_hf.profiling.latency import LatencyTable
from restnet_hf.profiling.macs import MacsTable, ParamsTable
from restnet_hf.profiling.memory import MB, MemoryTable, weight_bytes
from restnet_hf.routes.profile import Profile
from restnet_hf.steps import Step, Walk


class CostTable:
    """Costs of routes, with each piece counted once.

    Args:
        latency: latencies of the pieces on this device; without them ``latency_ms`` and ``energy_j`` are left out.
        memory: whether to count ``memory_mb``.
    """

    def __init__(self, latency: LatencyTable | None = None, memory: bool = True) -> None:
        self.latency = latency
        self._macs, self._params = MacsTable(), ParamsTable()
        self._memory = MemoryTable(1 if latency is None else latency.batch_size) if memory else None

    def macs(self, steps: Sequence[Step]) -> float:
        """MACs of some steps in a row, for one image."""
        return self._macs.macs(steps)

    def latency_ms(self, steps: Sequence[Step]) -> float:
        """Milliseconds of some steps in a row, for one image; 0 without latencies."""
        return 0.0 if self.latency is None else self.latency.latency_ms(steps) / self.latency.batch_size

    def joint_costs(self, walks: Sequence[Walk]) -> dict[str, float]:
        """What routes take together that are all there and run in turn: parameters, and megabytes where counted.

        Args:
            walks: routes with their steps.
        """
        every = [step for _, steps in walks for step in steps]
        costs: dict[str, float] = {"params": self._params.params(every)}
        if self._memory is not None:
            # each later route may begin at an activation that is kept, which is no larger than what its own run holds
            peaks = [self._memory.activation_bytes(steps) for _, steps in walks]
            costs["memory_mb"] = (weight_bytes(every) + max(peaks) + min(peaks)) / MB
        return costs

    def costs(self, steps: Sequence[Step]) -> dict[str, float]:
        """Costs of a route for one image, by name.

        Energy is latency times the power that the processor drew while routes ran, where the system counts it.

        Args:
            steps: steps of the route.
        """
        costs: dict[str, float] = {"macs": self._macs.macs(steps), "params": self._params.params(steps)}
        if self._memory is not None:
            costs["memory_mb"] = self._memory.memory_mb(steps)
        if self.latency is not None:
            costs["latency_ms"] = self.latency_ms(steps)
            if self.latency.watts is not None:
                costs["energy_j"] = self.latency.watts * costs["latency_ms"] / 1e3
        return costs


def describe_measurement(device: str, latency: LatencyTable | None, before: Profile | None) -> dict[str, Any]:
    """The metadata of a profile on where its numbers come from.

    Args:
        device: device of the model.
        latency: table that latencies in the costs are from.
        before: profile that the new one replaces, whose measurements of exported routes are kept.
    """
    measured: dict[str, Any] = {} if latency is None else {"latency": latency.metadata()}
    measured |= {"device": device, "machine": platform.machine(), "date": datetime.date.today().isoformat()}
    measured["versions"] = package_versions()
    kept = {} if before is None else before.metadata
    return measured | {key: kept[key] for key in ("runtimes",) if key in kept}
