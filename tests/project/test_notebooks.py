"""The notebooks are valid, hold no outputs, and their code runs from the first cell to the last."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from versions import needs_export


FOLDER = Path(__file__).parents[2] / "recipes" / "notebooks"
NOTEBOOKS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.ipynb"))}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_form(name):
    """The format that Jupyter writes, a badge that opens this very file, and nothing of a run."""
    notebook = NOTEBOOKS[name]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len({*ids}) == len(ids) and notebook["cells"][0]["source"][0].startswith("# ")
    assert f"recipes/notebooks/{name}.ipynb" in "".join(notebook["cells"][0]["source"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and cell["source"]
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@needs_export
@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_code_runs(name, tmp_path):
    if name.startswith("export"):
        pytest.importorskip("onnxruntime")
    cells = ["".join(cell["source"]) for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]
    loose = (
        "from restnet_hf.profiling import timing; timing.MAX_SPREAD = float('inf')"  # other tests run beside this one
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n\n".join([loose, *cells])], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_three():
    assert len(NOTEBOOKS) == 3
