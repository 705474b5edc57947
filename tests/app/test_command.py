"""The command app: what it opens, and options that do not fit."""

import sys

import pytest
from typer.testing import CliRunner

from restnet_hf.app import start
from restnet_hf.cli import app
from restnet_hf.demo import DATA, END, FRONT, load_demo


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--front", "a"], "give --front, --end and --dataset together"),
        (["me/it", "--front", "a", "--end", "b", "--dataset", "c"], "without an adapter or --data"),
        (["--data", "photos"], "--data is for an adapter"),
    ],
)
def test_options_that_do_not_fit(options, message):
    result = CliRunner().invoke(app, ["app", *options])
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", "").split())


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    result = CliRunner().invoke(app, ["app"])
    assert result.exit_code == 1 and "pip install 'restnet-hf[app]'" in result.output


@pytest.fixture
def quick(monkeypatch):
    """Fewer images, and no measurement of time beside other tests."""
    monkeypatch.setattr(start, "IMAGES", 150)
    monkeypatch.setattr(start, "add_latency", lambda model: None)


def test_what_is_opened(quick, tmp_path):
    """The demo; an adapter, with its own profile or one made of images; two anchors, stitched and profiled."""
    model, images, examples = start.open_demo()
    assert model.profiled.cascades and len(images) == 150 and len(examples) == start.EXAMPLES
    load_demo().save_pretrained(tmp_path / "adapter", standalone=True)
    model, images, examples = start.open_adapter(str(tmp_path / "adapter"))
    assert len(model.profiled.cascades) == 8 and images is None and examples == []
    (tmp_path / "adapter" / "profile.json").unlink()
    with pytest.raises(ValueError, match="has no profile to show; give labelled images"):
        start.open_adapter(str(tmp_path / "adapter"))
    model, images, examples = start.open_adapter(str(tmp_path / "adapter"), str(DATA))
    assert model.profiled.cascades and all("accuracy" in row.scores for row in model.profiled.routes) and examples


@pytest.mark.slow
def test_two_anchors(quick):
    model, images, examples = start.open_anchors(str(FRONT), str(END), str(DATA))
    assert 2 < len(model.profiled.routes) <= 2 + start.MAX_ROUTES and model.profiled.cascades
    assert len(images) == 150 and examples


def test_latencies_are_left_out_where_they_scatter(monkeypatch):
    model = load_demo()

    def scatter(**_):
        raise RuntimeError("no latency can be given")

    monkeypatch.setattr(model, "measure_latency", scatter)
    start.add_latency(model)
    assert all("latency_ms" not in row.costs for row in model.profiled.routes)
