# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf"]
# ///
"""Write the released cards into model_cards/ from what recipes have left: python recipes/cards.py model_cards RUN ...

RUN is a folder that `restnet-hf train` or `restnet-hf demo` wrote; its name becomes the adapter's. The card is the one
that `push_to_hub` pushes, with standalone=True where the run's anchors are local folders.
"""

import json
import shutil
import sys
from pathlib import Path

from huggingface_hub import HfApi

from restnet_hf.hub.repository import PLOT, PROFILE, parents_on_card, write_card
from restnet_hf.routes.profile import Profile


OWNER = "restnet-hf"


def write(run: Path, out: Path) -> None:
    """The card, profile and picture of one run."""
    config = json.loads((run / "adapter" / "config.json").read_text())
    profile = Profile.load(run / "adapter" / PROFILE)
    parents = parents_on_card(config["anchors"], HfApi())
    standalone = not all(parent["repo_id"] for parent in parents)
    folder = out / run.name
    folder.mkdir(parents=True, exist_ok=True)
    profile.save(folder / PROFILE)
    shutil.copy(run / PLOT, folder / PLOT)
    write_card(folder, f"{OWNER}/{run.name}", parents, profile, standalone, training=config["training"])


if __name__ == "__main__":
    for name in sys.argv[2:]:
        write(Path(name).resolve(), Path(sys.argv[1]))
