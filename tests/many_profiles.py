"""Profiles of many adapters."""

import numpy as np

from restnet_hf.routes.profile import Profile, ProfiledRoute
from restnet_hf.routes.route import Route


def profiles(count: int) -> dict[str, Profile]:
    """Adapters of two routes each, by repository, with costs over three decades."""
    rng = np.random.default_rng(0)
    found = {}
    for index in range(count):
        rows = [
            ProfiledRoute(
                Route.parse(route),
                {
                    "macs": float(rng.uniform(1, 4) * 10 ** rng.uniform(6, 10)),
                    "params": float(10 ** rng.uniform(5, 9)),
                },
                {"accuracy": float(rng.uniform())},
            )
            for route in ("a[:]", "a[:1] + b[2:]")
        ]
        found[f"me/found-{index:02}"] = Profile(
            tuple(rows), {"dataset": "me/noise", "device": ["cpu", "cuda"][index % 2]}
        )
    return found
