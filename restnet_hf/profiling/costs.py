"""All costs of routes together."""

from collections.abc import Sequence

from restnet_hf.profiling.latency import LatencyTable
from restnet_hf.profiling.macs import MacsTable, ParamsTable
from restnet_hf.profiling.memory import MemoryTable
from restnet_hf.steps import Step


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
            costs["latency_ms"] = self.latency.latency_ms(steps) / self.latency.batch_size
            if self.latency.watts is not None:
                costs["energy_j"] = self.latency.watts * costs["latency_ms"] / 1e3
        return costs
