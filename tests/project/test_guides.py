"""The code of the guides runs, the commands of the README and the guides exist, and their links lead somewhere."""

import contextlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
from hub_server import World, running
from safetensors.torch import save_file

from restnet_hf.cli import app
from restnet_hf.data import AUGMENTATIONS
from restnet_hf.profiling import timing
from restnet_hf.routes.families import FAMILIES
from restnet_hf.runtime import RUNTIMES
from restnet_hf.selection.selectors import SELECTORS
from restnet_hf.stitches.layers import STITCHES
from restnet_hf.training.samplers import SAMPLERS


ROOT = Path(__file__).parents[2]
GUIDES = {path.stem: path for path in sorted((ROOT / "recipes" / "guides").glob("*.md"))}
PAGES = {"README": ROOT / "README.md", "recipes": ROOT / "recipes" / "README.md", **GUIDES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
EXTENDED = (AUGMENTATIONS, FAMILIES, RUNTIMES, SAMPLERS, SELECTORS, STITCHES)
COMMANDS = typer.main.get_command(app).commands
GROUPED = [command for group in COMMANDS.values() for command in getattr(group, "commands", {}).values()]
PARAMETERS = [parameter for command in (*COMMANDS.values(), *GROUPED) for parameter in command.params]
OPTIONS = {option for parameter in PARAMETERS for option in (*parameter.opts, *parameter.secondary_opts)}
SCRIPTS = [*(ROOT / "recipes" / "benchmarks").glob("*.py"), *(ROOT / "recipes").glob("*.py")]
BENCHMARKS = "".join(path.read_text() for path in SCRIPTS)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
on_every_page = pytest.mark.parametrize("page", PAGES)


def code_of(page, language):
    """The blocks of a page in one language as one text, every line with the number that it has in the page."""
    text, lines = PAGES[page].read_text(), {}
    for match in FENCE.finditer(text):
        first = text[: match.start(2)].count("\n")
        if match[1] == language:
            lines |= dict(enumerate(match[2].splitlines(), first))
    return "\n".join(lines.get(number, "") for number in range(max(lines, default=-1) + 1))


def prose_of(page):
    """A page without its blocks of code."""
    return FENCE.sub("", PAGES[page].read_text())


def headings_of(path):
    """The anchors of a page's headings, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def tables():
    """The tables that guides extend; their own rows alone are left afterwards."""
    before = [dict(table) for table in EXTENDED]
    yield
    for table, rows in zip(EXTENDED, before, strict=True):
        table.clear()
        table.update(rows)


def test_there_is_a_guide_for_each_task():
    assert [*GUIDES] == [
        *("adapt", "app", "assistants", "choose", "compare", "contribute", "cost", "data", "export", "extend"),
        *("share", "train"),
    ]
    for page in ("README", *GUIDES):
        linked = {Path(link).stem for link in re.findall(r"\]\(([\w/]+\.md)\)", PAGES[page].read_text())}
        assert linked >= {*GUIDES} - {page}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({*GUIDES} - {"app", "share", "compare", "contribute", "cost"}))
def test_code_runs(page, tmp_path, monkeypatch, tables):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "MAX_SPREAD", float("inf"))  # other tests run beside this one
    code = compile(code_of(page, "python"), PAGES[page], "exec")
    names = {"__name__": page}
    with contextlib.redirect_stdout(None):
        exec(code, names)
    for made in (each for each in names.values() if isinstance(each, type) and each.__module__ == page):
        public = {name for name in vars(made) if callable(getattr(made, name)) and not name.startswith("_")}
        assert public <= {*dir(made.__base__)}, f"{made.__name__} has methods that nothing calls"


@pytest.mark.slow
def test_code_of_the_page_runs(tmp_path):
    """In a process of its own, as gradio leaves event loops open."""
    pytest.importorskip("gradio")
    done = subprocess.run(
        [sys.executable, "-c", code_of("app", "python")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"route.png", "tradeoff.png"}


@pytest.mark.slow
def test_code_runs_with_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"images": torch.zeros(1)}, tmp_path / "images.safetensors")  # what every process of a World reads
    with running() as hub:
        world = World(hub, tmp_path)
        with contextlib.closing(world.processes):
            spread = (
                "from restnet_hf.profiling import timing\ntiming.MAX_SPREAD = float('inf')\n"  # others run beside it
            )
            printed = world.run(spread + code_of("share", "python"), whole=True)
        assert {*hub.repos} == {"me/my-stitch"}
    assert printed.startswith("me/my-stitch resnet_fashion[:")


def test_no_other_page_has_code():
    assert PAGES["README"].read_text().count("```python") == 1  # which runs in test_readme
    assert not code_of("recipes", "python") and not code_of("contribute", "python")
    assert not code_of("cost", "python")


@on_every_page
def test_commands_exist(page):
    """Commands of ours parse, and the extras that are installed are there."""
    for line in filter(None, code_of(page, "bash").splitlines()):
        for command in line.split("&&"):
            program, *words = shlex.split(command)
            if Path(program).name == "restnet-hf":
                named = COMMANDS[words.pop(0)]
                while hasattr(named, "commands"):
                    named = named.commands[words.pop(0)]
                named.make_context(named.name, words)
            elif Path(program).name == "pip":
                extras = re.findall(r"\[(.*?)\]", command)
                assert "install" in words and {*extras} <= {*PROJECT["optional-dependencies"]}
            else:
                assert Path(program).name in ("python", "python3", "pytest", "ruff", "mypy")


@on_every_page
def test_names_of_commands_and_options_exist(page):
    named = re.findall(r"`restnet-hf ([a-z]+)", prose_of(page))
    assert {*named} <= {*COMMANDS}
    others = {*re.findall(r"`(--[a-z-]+)", prose_of(page))} - OPTIONS
    assert all(f"{option[2:].replace('-', '_')}: " in BENCHMARKS for option in others), others


@on_every_page
def test_links_lead_to_a_file_and_a_heading(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)) if "://" not in link]
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        path = (PAGES[page].parent / file).resolve() if file else PAGES[page]
        assert path.exists() and path.is_relative_to(ROOT), link
        assert not heading or heading in headings_of(path), link


def test_the_links_of_the_package_lead_to_the_readme():
    for name, url in PROJECT["urls"].items():
        path, _, heading = url.removeprefix(PROJECT["urls"]["Homepage"]).partition("#")
        assert url.startswith(PROJECT["urls"]["Homepage"])
        assert path in ("", ".git", "/issues"), name
        assert not heading or heading in headings_of(PAGES["README"])
