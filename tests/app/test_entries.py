"""What the page offers and answers, without a browser: limits, entries, runs, marks of charts."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from restnet_hf import Profile, ProfiledRoute, Route, load_images
from restnet_hf.app.entries import (
    AppModel,
    best_entry,
    check_model,
    cost_ranges,
    describe_row,
    first_entry,
    offered_entries,
    read_picture,
    run_entry,
    standard_error,
)
from restnet_hf.app.svg import SVG, as_svg
from restnet_hf.demo import ADAPTER, DATA, load_demo
from restnet_hf.errors import BudgetError, PictureError
from restnet_hf.files import sha256_of
from restnet_hf.profiling.plots import new_figure
from restnet_hf.routes.cascade import Cascade


@pytest.fixture(scope="module")
def model():
    return load_demo()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "one.png"
    load_images(DATA, "test")[0]["image"].save(path)
    return str(path)


def test_the_demo_is_what_it_says(model):
    """Its profile holds on the package's test images: the active route and a cascade, counted here."""
    rows = load_images(DATA, "test")
    data = model.prepare_data(rows)
    labels = torch.tensor(rows["label"])
    images = torch.stack([data[i]["pixel_values"] for i in range(len(data))])
    with torch.no_grad():
        for row in (model.profiled[str(model.active_route)], model.profiled.routes[0]):
            right = (model(images, route=row.route).logits.argmax(1) == labels).double().mean()
            assert right.item() == pytest.approx(row.scores["accuracy"], abs=1e-9)
        cascade = model.profiled.cascades[0]
        right = (model(images, cascade=cascade.route).logits.argmax(1) == labels).double().mean().item()
        assert abs(right - cascade.scores["accuracy"]) < 3 * cascade.standard_error
    assert all("/" not in str(entry["repo_id"]) for entry in model.config.anchors)  # no paths of another machine
    sums = json.loads((ADAPTER / "config.json").read_text())["sha256"]
    assert len(sums) == 4 and all(sha256_of(ADAPTER / name) == digest for name, digest in sums.items())


def test_ranges_hold_all_entries(model):
    ranges = {each.cost: each for each in cost_ranges(model.profiled)}
    assert {"macs", "mean_macs", "memory_mb"} <= ranges.keys()
    macs = [row.costs["macs"] / 1e6 for row in model.profiled.rows]
    assert ranges["macs"].low <= min(macs) < min(macs) + ranges["macs"].step >= 0
    assert max(macs) <= ranges["macs"].high <= max(macs) + ranges["macs"].step
    assert cost_ranges(Profile((ProfiledRoute(Route.parse("a[:]"), {"macs": 1e6}, {}),))) == []


def test_limits_choose_what_the_profile_would(model):
    """At the ends everything, or the cheapest; between them what `best` gives; means let cascades in."""
    ranges = cost_ranges(model.profiled)
    free = [each.high for each in ranges]
    assert best_entry(model.profiled, ranges, free) == str(model.profiled.best({"macs": math.inf}).route)
    for number, each in enumerate(ranges):
        limits = [*free[:number], each.low, *free[number + 1 :]]
        cheapest = model.profiled[best_entry(model.profiled, ranges, limits)]
        least = min(row.costs[each.cost] for row in model.profiled.rows if each.cost in row.costs)
        assert cheapest.costs[each.cost] == pytest.approx(least)
        middle = (each.low + each.high) / 2
        limits = [*free[:number], middle, *free[number + 1 :]]
        expected = model.profiled.best({each.cost: middle * each.divisor}).route
        assert best_entry(model.profiled, ranges, limits) == str(expected)
    names = [each.cost for each in ranges]
    limits = [8.0 if name == "mean_macs" else high for name, high in zip(names, free, strict=True)]
    assert isinstance(model.profiled[best_entry(model.profiled, ranges, limits)].route, Cascade)
    limits = [each.low for each in ranges]
    with pytest.raises(BudgetError, match="no route fits"):
        best_entry(model.profiled, ranges, limits)


def test_answers_are_the_models_own(model, picture):
    """Of every entry: the same classes and probabilities as predict, and of cascades the route that answered."""
    before = model.active_route
    pixel_values = read_picture(model, picture)
    for row in model.profiled.rows:
        answer = run_entry(model, pixel_values, str(row.route))
        kind = "cascade" if isinstance(row.route, Cascade) else "route"
        expected = model.predict(picture, **{kind: row.route})
        assert answer.scores == {each["label"]: pytest.approx(each["score"], abs=1e-6) for each in expected}
        assert answer.milliseconds > 0
        assert answer.answered_by in (map(str, row.route.routes) if kind == "cascade" else [str(row.route)])
    assert model.active_route == before and model.active_cascade is None
    with pytest.raises(KeyError, match="no route"):
        run_entry(model, pixel_values, "vit_fashion[:3] + vit_fashion[4:]")


def test_offered(model):
    offered = offered_entries(model.profiled)
    front = [str(row.route) for row in model.profiled.front()]
    assert {*front} <= {*offered} and {"vit_fashion[:]", "resnet_fashion[:]"} <= {*offered}
    assert first_entry(model) == str(model.active_route)
    unscored = Profile(
        tuple(ProfiledRoute(Route.parse(r), {"macs": 1e6}, {}) for r in ("a[:]", "b[:]", "a[:1] + b[1:]"))
    )
    assert len(offered_entries(unscored)) == 3


def test_descriptions(model):
    row = model.profiled["vit_fashion[:]"]
    p = row.scores["accuracy"]
    assert standard_error(row, model.profiled) == pytest.approx(np.sqrt(p * (1 - p) / 1500))
    assert describe_row(row, model.profiled).startswith("MACs 5.16 M; memory 1.25 MB; accuracy 89.9 ± 0.8 %")
    text = describe_row(model.profiled.cascades[0], model.profiled)
    assert text.startswith("mean MACs 6.0") and "MACs at most 34.6 M" in text


@pytest.mark.parametrize("content", [b"no picture", b"\x89PNG\r\n\x1a\n broken", b""])
def test_pictures_that_cannot_be_read(model, tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(PictureError):
        read_picture(model, str(path))


def test_a_picture_of_too_many_pixels(model, tmp_path):
    """20,000 by 20,000 pixels in a file of some kilobytes are refused before they are decoded."""
    path = tmp_path / "x.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 1e6
    with pytest.raises(PictureError, match="too large"):
        read_picture(model, str(path))


def test_svg_is_text_marks_and_page_colours():
    """Hostile names stay text, a mark can be focused and pressed, and black follows the page's colour."""
    figure = new_figure(3, 2)
    axes = figure.add_subplot()
    (mark,) = axes.plot([1], [1], "o", color="black")
    mark.set_gid("entry-0")
    hostile = "<script>alert(1)</script> $x^{$ & \"'"
    axes.set_title(hostile, parse_math=False)
    text = as_svg(figure, hostile, {"entry-0": hostile})
    root = ElementTree.fromstring(text)
    assert "<script" not in text and not [each for each in root.iter() if "script" in each.tag]
    (found,) = [each for each in root.iter() if each.get("data-mark")]
    assert (found.get("tabindex"), found.get("role"), found.get("aria-label")) == ("0", "button", hostile)
    assert found.find(f"{{{SVG}}}title").text == hostile and root.get("aria-label") == hostile
    assert "#000000" not in text and "currentColor" in text and "width: 100%" in root.get("style")


def test_models_that_cannot_be_shown(pair):
    with pytest.raises(ValueError, match="no profile to show"):
        check_model(pair)
    assert AppModel(load_demo()).profile
