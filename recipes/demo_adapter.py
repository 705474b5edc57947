# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf"]
# ///
"""Make the adapter that ships with the package out of what the demo wrote, without the paths of this machine.

restnet-hf demo --out restnet-demo
python recipes/demo_adapter.py restnet-demo/adapter OUT
"""

from pathlib import Path

import typer

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.demo import END, FRONT


def main(adapter: Path, out: Path) -> None:
    """Write the adapter to OUT."""
    anchors = {folder.name: folder for folder in (FRONT, END)}
    model = StitchedModelForImageClassification.from_pretrained(
        adapter, anchors={k: str(v) for k, v in anchors.items()}
    )
    for entry in model.config.anchors:
        entry["repo_id"], entry["config"]["_name_or_path"] = None, ""
    model.save_pretrained(out)
    print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
