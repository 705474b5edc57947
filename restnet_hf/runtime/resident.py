"""A process of its own that loads an exported route, runs it, and prints its peak memory before and after."""

import json
import resource
import sys
from pathlib import Path

from restnet_hf.runtime.exported_files import read_profile
from restnet_hf.runtime.exported_model import ExportedModel
from restnet_hf.runtime.golden import made_images
from restnet_hf.runtime.runners import RUNTIMES, import_for_runtime


RUNS = 3  # after which a runtime holds all its buffers
STATUS = Path("/proc/self/status")


def peak_mb() -> float:
    """Peak resident memory of this process so far, in megabytes."""
    if STATUS.exists():  # Linux, whose ru_maxrss begins with that of the process that started this one
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)


def main(folder: str, route: str, threads: str) -> None:
    """Print the peak memory before a route is loaded and after it ran, in megabytes, as JSON.

    Args:
        folder: folder of exported routes.
        route: string form of the route.
        threads: number of processor threads as JSON; null for the runtime's own default.
    """
    for package in RUNTIMES[read_profile(Path(folder)).metadata["runtime"]].script_imports.split(", "):
        import_for_runtime(package, "")
    before = peak_mb()
    model = ExportedModel.from_pretrained(folder, route=route, threads=json.loads(threads))
    image = made_images(model.preprocessing)[:1]
    for _ in range(RUNS):
        model(image)
    print(json.dumps([before, peak_mb()]))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
