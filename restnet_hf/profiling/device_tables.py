"""The latencies of a model's routes as a table to publish, from the times of their pieces."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from restnet_hf.profiling.cascades import StageCosts
from restnet_hf.profiling.costs import CostTable
from restnet_hf.profiling.latency import LatencyTable
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.device_table import EAGER, FORMAT, DeviceTable, summarise_sustained
from restnet_hf.routes.route import Route
from restnet_hf.steps import Step


RUNTIME = re.compile(r"torch (?P<version>\S+) eager, (?P<dtype>\w+), batch \d+")  # as `measure_latency` names it
THREADS = re.compile(r", (\d+) threads?$")  # at the end of a processor's name, as `device_name` returns it
PRECISIONS = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # as exports name them


def make_device_table(
    latency: LatencyTable,
    routes: Iterable[Route],
    cascades: Iterable[Cascade],
    steps: Callable[[Route], Sequence[Step]],
    identity: Mapping[str, Any],
) -> DeviceTable:
    """The table of some routes and cascades on the device of their pieces.

    Args:
        latency: table that ``model.measure_latency`` returned.
        routes: routes of the model.
        cascades: cascades of these routes, with thresholds.
        steps: function that returns the steps of a route.
        identity: weights and repository that ``model.adapter_identity`` returned.

    Raises:
        ValueError: a piece of a route was not measured, or the table is not one of ``model.measure_latency``.
    """
    runtime, facts = RUNTIME.fullmatch(latency.runtime), latency.facts
    if runtime is None:
        raise ValueError(f"'{latency.runtime}' is not a runtime of measure_latency; measure the model again")
    threads, table = THREADS.search(latency.device), CostTable(latency, memory=False)
    walks = {cascade: [(route, steps(route)) for route in cascade.routes] for cascade in cascades}
    data: dict[str, Any] = {
        "format": FORMAT,
        "device": THREADS.sub("", latency.device),
        "machine": facts.get("machine", ""),
        "runtime": EAGER,
        "version": runtime["version"],
        "precision": PRECISIONS.get(runtime["dtype"], runtime["dtype"]),
        "threads": None if threads is None else int(threads[1]),
        "batch_size": latency.batch_size,
        "date": facts.get("date", ""),
        "versions": facts.get("versions", {}),
        "watts": latency.watts,
        "weights": identity["weights"],
        "routes": {str(route): table.latency_ms(steps(route)) for route in routes},
        "cascades": {
            str(cascade): list(StageCosts.of(each, table.latency_ms).added_costs(range(len(each))))
            for cascade, each in walks.items()
        },
    }
    if "sustained" in facts:
        data["sustained"] = summarise_sustained(facts["sustained"])
    return DeviceTable.from_dict(data, identity["repo_id"])
