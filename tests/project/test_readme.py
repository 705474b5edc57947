"""What the README says is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_rooms import FOLDERLESS, ROOMS

from restnet_hf import load_images
from restnet_hf.demo import DATA
from restnet_hf.routes.route import Route


README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()


def test_is_short():
    assert TEXT.count("\n") <= 200


@pytest.mark.slow
def test_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    for split, count in (("train", 200), ("test", 120)):
        rows = load_images(DATA, split).select(range(count))
        for index, (image, label) in enumerate(zip(rows["image"], rows["label"], strict=True)):
            folder = tmp_path / "pictures" / split / rows.features["label"].names[label].replace("/", " or ")
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index}.png")
    image.save(tmp_path / "new.png")
    (tmp_path / "example.py").write_text(code)
    subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True, timeout=200)
    assert (tmp_path / "my-stitch" / "model.safetensors").stat().st_size < 1e6


def test_words_come_before_they_are_used():
    words = re.findall(r"^\| (\w+(?:, \w+)*) \| ", TEXT, re.M)
    assert {"anchor", "cut", "stitch", "route", "profile", "budget"} <= {*words}
    first_code = TEXT.index("```python")
    assert all(TEXT.index(f"\n| {word} | ") < first_code for word in ("anchor", "cut", "stitch", "route"))


def test_map_names_the_rooms_in_the_order_of_imports():
    listed = re.findall(r"^\| `?(\w+)(/?)`? \| ", TEXT.partition("## Map")[2].partition("\n## ")[0], re.M)
    assert listed[0][0] == "room"
    assert listed[1:] == [(room, "" if room in FOLDERLESS else "/") for room in ROOMS]


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in FOLDERLESS])
def test_rooms_of_the_map_are_folders(package, room):
    assert (package / room).is_dir()


def test_commands_are_one_line_each():
    """``.ci/run`` takes the test command from here, and newcomers copy both."""
    for ending in (r"pytest", r"restnet-hf demo --out restnet-demo"):
        assert len(re.findall(rf"^python3 -m venv .*{ending}$", TEXT, re.M)) == 1


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links and all((README.parent / link).exists() for link in links)


def test_routes_parse():
    routes = re.findall(r"`(\w+\[:\d*\](?: \+ \w+\[\d+:\])*)`", TEXT)
    assert routes and all(str(Route.parse(route)) == route for route in routes)
