"""Figures show what they are given."""

import numpy as np
import pytest
from PIL import Image

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


def test_similarity(tmp_path):
    values = np.ma.masked_array([[0.1, 0.9], [0.5, 0.5], [0.2, 0.3]], [[0, 0], [1, 0], [0, 0]])
    found = Similarity("a", "b", values, {"method": "cka", "images": 64})
    plot_similarity(found, [], tmp_path / "none.png")
    plot_similarity(found, [Route.parse("a[:1] + b[2:]")], tmp_path / "one.png")
    red = [(abs(pixels(tmp_path / f"{n}.png") - [213, 94, 0]).sum(2) < 30).sum() for n in ("none", "one")]
    assert red[0] == 0 < red[1]


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
