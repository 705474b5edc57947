# /// script
# requires-python = ">=3.11"
# dependencies = ["restnet-hf[docs]"]
# ///
"""Build the documentation's site out of the README, the guides, the results and the docstrings.

    python recipes/docs/build.py OUT

Pages keep their places, so that links between them work on the site as they do in the repository. A broken link is an
error, and so is a reference to a name that does not exist.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import typer


ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "LICENSE", "recipes", "model_cards")
LEFT_OUT = ("__pycache__",)
ROOMS = re.compile(r"^\| `(\w+)/` \| (.+) \|$", re.M)  # of the README's map


def main(out: Path) -> None:
    """Build the site into OUT."""
    with tempfile.TemporaryDirectory() as name:
        pages = Path(name) / "pages"
        pages.mkdir()
        for page in PAGES:
            if (ROOT / page).is_dir():
                shutil.copytree(ROOT / page, pages / page, ignore=shutil.ignore_patterns(*LEFT_OUT))
            else:
                shutil.copy(ROOT / page, pages / page)
        config = write_reference(pages, Path(name))
        command = ["build", "--strict", "--config-file", str(config), "--site-dir", str(out.resolve())]
        environment = {**os.environ, "RESTNET_HF_DOCS": str(pages), "NO_MKDOCS_2_WARNING": "1"}
        done = subprocess.run([sys.executable, "-m", "mkdocs", *command], env=environment)
    sys.exit(done.returncode)


def write_reference(pages: Path, folder: Path) -> Path:
    """Write a page for each room of the package, and the configuration that lists them; returns its path."""
    lines, rooms = ["  - Reference:"], dict(ROOMS.findall((ROOT / "README.md").read_text()))
    (pages / "reference").mkdir()
    package = ROOT / "restnet_hf"
    for room, purpose in [("", "the package itself"), *rooms.items()]:
        files = sorted(path for path in (package / room).glob("*.py") if not path.name.startswith("_"))
        names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
        title = room or "restnet_hf"
        text = [f"# `{title}`", "", f"{purpose[0].upper()}{purpose[1:]}.", "", *(f"::: {name}\n" for name in names)]
        (pages / "reference" / f"{title}.md").write_text("\n".join(text))
        lines.append(f"      - {title}: reference/{title}.md")
    config = folder / "mkdocs.yml"
    config.write_text((ROOT / "recipes" / "docs" / "mkdocs.yml").read_text() + "\n".join(lines) + "\n")
    return config


if __name__ == "__main__":
    typer.run(main)
