"""Run the same code in one process and in several that share the work, and return what the main one prints."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


END = """
import torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def start_processes(script: Path, count: int, arguments: Sequence[str] = ()) -> subprocess.Popen:
    """Start a script in its folder, in one process or several.

    Args:
        script: script to run.
        count: number of processes.
        arguments: arguments of the script.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command, pipes = [sys.executable, *launch, str(script), *arguments], {"stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, cwd=script.parent, env=environment, stderr=subprocess.PIPE, **pipes)


def run_in_processes(
    code: str, folder: Path, counts: Sequence[int] = (1, 2, 3), arguments: Sequence[str] = ()
) -> list[Any]:
    """Run code once for each number of processes; returns the JSON that it prints last, each time.

    Args:
        code: Python code; in several processes each runs all of it, and the main one alone prints.
        folder: folder to run in.
        counts: numbers of processes.
        arguments: arguments of the code, in ``sys.argv[1:]``.
    """
    script, results = folder / "job.py", []
    script.write_text(code + END)
    for count in counts:
        process = start_processes(script, count, arguments)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        results.append(json.loads(out.strip().splitlines()[-1]))
    return results
