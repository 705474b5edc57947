"""Figures show what they are given."""

import numpy as np
import pytest
from PIL import Image

from restnet_hf.demo import load_demo
from restnet_hf.profiling.macs import MacsTable
from restnet_hf.profiling.plots import plot_tradeoff
from restnet_hf.routes.profile import Profile, ProfiledRoute
from restnet_hf.routes.route import Route
from restnet_hf.selection.plots import plot_similarity
from restnet_hf.selection.ranking import Similarity


def profile(*rows):
    return Profile(tuple(ProfiledRoute(Route.parse(r), {"macs": m * 1e6}, {"accuracy": a}) for r, m, a in rows))


ANCHORS = (("a[:]", 30, 0.9), ("b[:]", 5, 0.8))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_tradeoff(tmp_path):
    after = profile(*ANCHORS, ("a[:2] + b[1:]", 12, 0.85))
    plot_tradeoff(profile(*ANCHORS), tmp_path / "anchors.png")
    plot_tradeoff(after, tmp_path / "after.png")
    plot_tradeoff(after, tmp_path / "both.png", profile(*ANCHORS, ("a[:2] + b[1:]", 12, 0.5)))
    blue = [
        ((p := pixels(tmp_path / f"{n}.png"))[..., 2] - p[..., 0] > 100).sum() for n in ("anchors", "after", "both")
    ]
    assert blue[0] == 0 < blue[1]
    assert len(list(tmp_path.iterdir())) == 3


def test_the_line_between_the_anchors_is_drawn(tmp_path):
    """In the anchors' red, dotted; without a second anchor there is none."""
    plot_tradeoff(profile(*ANCHORS), tmp_path / "two.png")
    plot_tradeoff(profile(ANCHORS[0], ("a[:2] + b[1:]", 5, 0.8)), tmp_path / "one.png")
    red = [((p := pixels(tmp_path / f"{n}.png"))[..., 0] - p[..., 2] > 100).sum() for n in ("one", "two")]
    assert red[1] > 2.2 * red[0] > 0


def test_every_row_has_a_mark_and_costs_can_be_chosen(demo):
    """Marks are numbered as the rows of the profile; what has no such cost is left out, or an error."""
    figure = demo.plot_tradeoff()
    marks = {artist.get_gid() for artist in figure.axes[0].lines} - {None}
    assert marks == {f"entry-{number}" for number in range(len(demo.profiled.rows))}
    assert "mean over images" in figure.axes[0].get_xlabel()
    assert demo.plot_tradeoff(cost="memory_mb").axes[0].get_xlabel() == "memory, MB"
    with pytest.raises(ValueError, match="no latency_ms"):
        demo.plot_tradeoff(cost="latency_ms")


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def test_route_plots_are_to_scale(demo, tmp_path):
    """Boxes as wide as their MACs, filled where they run, one lane a segment; those that do not run are clear."""
    route = "resnet_fashion[:5] + vit_fashion[6:]"
    figure = demo.plot_route(route, tmp_path / "route.png")
    boxes = [patch for patch in figure.axes[0].patches if patch.get_width()]
    table = MacsTable()
    expected = [macs for name in ("resnet_fashion", "vit_fashion") for macs in table.blocks(demo.anchors[name])]
    assert len(boxes) == len(expected)
    total = table.macs(demo.steps(demo.route(route)))
    for box, macs in zip(boxes, expected, strict=True):
        assert box.get_width() == pytest.approx(max(macs, 0.012 * total))
    filled = [box.get_facecolor()[3] > 0 for box in boxes]
    assert filled == [True] * 5 + [False] * 4 + [False] * 6 + [True]
    lines = figure.axes[0].lines
    assert [line.get_marker() for line in lines].count("D") == 1 and pixels(tmp_path / "route.png").size
    cascade = demo.profiled.cascades[0]
    titles = [axes.get_title(loc="left") for axes in demo.plot_route(cascade.route).axes]
    assert len(titles) == len(cascade.route.routes) and "100% of the images" in titles[0]
    assert len(demo.plot_route().axes) == 1
    with pytest.raises(ValueError, match="has no stitch yet"):
        demo.plot_route("resnet_fashion[:2] + vit_fashion[2:]")


def test_similarity(tmp_path):
    values = np.ma.masked_array([[0.1, 0.9], [0.5, 0.5], [0.2, 0.3]], [[0, 0], [1, 0], [0, 0]])
    found = Similarity("a", "b", values, {"method": "cka", "images": 64})
    plot_similarity(found, [], tmp_path / "none.png")
    plot_similarity(found, [Route.parse("a[:1] + b[2:]")], tmp_path / "one.png")
    red = [(abs(pixels(tmp_path / f"{n}.png") - [213, 94, 0]).sum(2) < 30).sum() for n in ("none", "one")]
    assert red[0] == 0 < red[1]
    figure = plot_similarity(found, cells=True)
    cells = {patch.get_gid() for patch in figure.axes[0].patches}
    assert cells == {f"cell-0-{i}-{j}" for i in range(3) for j in range(2)} - {"cell-0-1-0"}  # the masked one


def test_nothing_is_left_of_a_failed_plot(tmp_path):
    with pytest.raises(ValueError, match="no macs or no accuracy"):
        plot_tradeoff(Profile((ProfiledRoute(Route.parse("a[:]"), {"macs": 1.0}),)), tmp_path / "bad.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "rows", [(), ANCHORS, [("a[:1] + b[1:]", 1.0, 0.5)], [("a[:]", 1e280, 1e280), ("b[:]", -1e280, 0.1)]]
)
def test_any_profile_is_drawn(tmp_path, rows):
    """No routes, no anchors, no stitches, or numbers that nobody measured."""
    plot_tradeoff(profile(*rows), tmp_path / "any.png")
    assert pixels(tmp_path / "any.png").size
