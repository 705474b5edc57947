"""What the README says is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_ladder import LADDER

from restnet_hf.routes.route import Route


README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()


def test_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    (tmp_path / "example.py").write_text(code)
    subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True, timeout=200)
    assert (tmp_path / "my-stitch" / "model.safetensors").stat().st_size < 1e6


@pytest.mark.parametrize("module", LADDER)
def test_module_map_is_whole(module):
    assert re.search(rf"^{re.escape(module)}\.py ", TEXT, re.M)


def test_module_map_is_in_the_order_of_imports():
    listed = re.findall(r"^([\w.]+)\.py ", TEXT, re.M)
    assert listed == LADDER


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links and all((README.parent / link).exists() for link in links)


def test_routes_parse():
    routes = re.findall(r"`(\w+\[:\d*\](?: \+ \w+\[\d+:\])*)`", TEXT)
    assert routes and all(str(Route.parse(route)) == route for route in routes)
