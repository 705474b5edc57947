"""The model: anchors joined, labels and images aligned, routes switched, costs within budgets."""

import copy
import dataclasses
import time

import pytest
import timm
import torch
from conftest import CLASSES, SIZE, make_anchor, make_model, spread
from timm.models import save_for_hf
from torch import nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from restnet_hf import BudgetError, StitchConfig, StitchedModelForImageClassification, load_anchor, train
from restnet_hf.adaptation.scorer import Scorer
from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.routes.route import Route


LEARNS = ("proj.weight", "proj.bias", "pool.weight", "pool.bias")
NAMES = ["cat", "dog", "owl", "ant", "bee"]


def build(*anchors, **options):
    return StitchedModelForImageClassification.from_anchors(*anchors, **{"order": "given", **options})


def test_order():
    large, small = make_anchor("mobilenet"), make_anchor("resnet")
    assert list(build(small, large).anchors) == ["resnet", "mobilenet"]
    assert list(build(small, large, order="large-to-small").anchors) == ["mobilenet", "resnet"]
    assert list(build(large, small, order="small-to-large").anchors) == ["resnet", "mobilenet"]
    with pytest.raises(ValueError, match="order='up' is not one of"):
        build(small, large, order="up")
    with pytest.raises(ValueError, match="at least one classifier"):
        build()


def test_forward_is_front_stitch_end(pair, images):
    front, end = pair.anchors["resnet"], pair.anchors["vit"]
    with torch.no_grad():
        by_hand = end(pair.stitches["resnet_3__vit_2"](front(images, stop=3)), start=2)
        assert torch.equal(pair(images).logits, by_hand)
        pair.set_route("vit[:]")
        assert torch.equal(pair(images).logits, make_model("vit", 1)(images).logits)
        labels = torch.arange(len(images)) % CLASSES
        loss = pair(pixel_values=images, labels=labels).loss
        assert loss == nn.functional.cross_entropy(pair(images).logits, labels)
        assert isinstance(pair(images, return_dict=False), tuple)


def test_anchors_are_not_initialised_again():
    """A PreTrainedModel gives new random weights to plain modules inside it, unless it is told not to."""
    model = build(make_anchor("plain"), make_anchor("mobilenet"))
    for name in ("plain", "mobilenet"):
        fresh = make_model(name).state_dict()
        assert all(torch.equal(value, fresh[key]) for key, value in model.anchors[name].model.state_dict().items())


def test_what_trains(pair, capsys):
    trainable = {name for name, p in pair.named_parameters() if p.requires_grad}
    assert trainable == {f"stitches.resnet_3__vit_2.{name}" for name in LEARNS}
    pair.train()
    assert pair.training and not any(
        module.training for module in pair.anchors.modules() if module is not pair.anchors
    )
    count = sum(p.numel() for p in pair.stitches.parameters())
    pair.print_trainable_parameters()
    assert f"trainable params: {count:,} || all params: " in capsys.readouterr().out


def test_front_keeps_no_gradients(pair, images):
    seen = []
    pair.stitches["resnet_3__vit_2"].register_forward_pre_hook(lambda m, args: seen.append(args[0].grad_fn))
    pair.train()
    pair(images).logits.sum().backward()
    assert seen == [None]
    assert all(p.grad is not None for p in pair.stitches.parameters())


def named(name, labels, seed=0, **preprocessing):
    anchor = make_anchor(name, seed)
    anchor.label_names = tuple(labels)
    anchor.preprocessing = dataclasses.replace(anchor.preprocessing, **preprocessing)
    return anchor


def test_shuffled_labels_are_aligned(images):
    shuffled = [NAMES[i] for i in (3, 0, 4, 1, 2)]
    model = build(named("resnet", NAMES), named("vit", shuffled, 1))
    assert list(model.config.id2label.values()) == NAMES
    model.set_route("vit[:]")
    with torch.no_grad():
        raw, aligned = make_model("vit", 1)(images).logits, model(images).logits
    for position, name in enumerate(NAMES):
        assert torch.equal(aligned[:, position], raw[:, shuffled.index(name)])
    assert torch.equal(model.bake()(images), aligned)


@pytest.mark.parametrize("other", [[*NAMES[:4], "fox"], None])
def test_different_labels_need_a_new_head(other):
    end = named("vit", other) if other else make_anchor("vit")
    with pytest.raises(ValueError, match=r"do not name the same classes .* new head with num_labels="):
        build(named("resnet", NAMES), end)
    model = build(named("resnet", NAMES), end, num_labels=3)
    assert model(torch.zeros(1, 3, SIZE, SIZE)).logits.shape == (1, 3)


def test_new_head(images):
    model = build(make_anchor("resnet"), make_anchor("vit", 1), id2label={0: "a", 1: "b"})
    assert model.config.id2label == {0: "a", 1: "b"} and model.config.num_labels == 2
    for name in ("resnet", "vit"):
        model.set_route(f"{name}[:]")
        features = model.anchors[name](images)
        assert torch.equal(model(images).logits, model.heads[name](features))
    model.set_route(model.add_stitch("resnet[:2] + vit[1:]"))
    assert model.bake()(images).shape == (6, 2)
    assert {name.split(".")[0] for name in model.adapter_state_dict()} == {"heads", "stitches"}


def test_each_anchor_sees_its_own_preparation(images):
    """The end, run alone, gets the images as its own processor would have prepared them."""
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    model = build(named("resnet", NAMES, **imagenet), named("vit", NAMES, 1, **half))
    raw = torch.rand(4, 3, SIZE, SIZE)
    model.set_route("vit[:]")

    def prepared(options):
        return (raw - torch.tensor(options["mean"]).view(3, 1, 1)) / torch.tensor(options["std"]).view(3, 1, 1)

    with torch.no_grad():
        assert torch.allclose(model(prepared(imagenet)).logits, make_model("vit", 1)(prepared(half)).logits, atol=1e-4)


def test_other_image_size():
    front = named("resnet", NAMES)
    end = Anchor(make_model("mobilenet"), "mobilenet", Preprocessing((80, 80)), label_names=NAMES)
    model = build(front, end)
    smooth = torch.linspace(-1, 1, SIZE).expand(2, 3, SIZE, SIZE)
    model.set_route("mobilenet[:]")
    with torch.no_grad():
        resized = nn.functional.interpolate(smooth, size=(80, 80), mode="bilinear", antialias=True)
        assert torch.allclose(model(smooth).logits, make_model("mobilenet")(resized), atol=1e-5)
        route = model.add_stitch("resnet[:4] + mobilenet[3:]")
        model.fit_stitches(torch.randn(8, 3, SIZE, SIZE))
        model.set_route(route)
        assert torch.equal(model.bake()(smooth), model(smooth).logits)


def test_routes_come_and_go(pair):
    second = pair.add_stitch("resnet[:3] + vit[2:3] + resnet[4:]", StitchConfig(class_token="learn"))
    assert set(pair.stitches) == {"resnet_3__vit_2", "vit_3__resnet_4"}
    assert [str(route) for route in pair.all_routes] == ["resnet[:]", "vit[:]", *pair.config.routes]
    assert pair.set_route(second) == pair.active_route
    with pytest.raises(ValueError, match="is the active route"):
        pair.delete_stitch(second)
    pair.set_route("resnet[:3] + vit[2:]")
    pair.delete_stitch(second)
    assert set(pair.stitches) == set(pair.config.stitches) == {"resnet_3__vit_2"}
    with pytest.raises(ValueError, match="there is no route"):
        pair.delete_stitch(second)


def test_cut_names_in_routes(pair):
    front, end = pair.anchors["resnet"].cuts[2].name, pair.anchors["vit"].cuts[1].name
    assert str(pair.set_route(f"resnet[:{front}] + vit[{end}:]")) == "resnet[:3] + vit[2:]"


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("resnet[:3] + vit[2", "is not a route"),
        ("resnet[:3] + vit[99:]", "'vit' has cuts 1 to 3, not 99"),
        ("resnet[:3] + bert[1:]", "no anchor named 'bert'"),
        ("resnet[:nowhere] + vit[2:]", "no cut 'nowhere'"),
        ("bert[:nowhere] + vit[2:]", "no anchor named 'bert'"),
        ("resnet[:2] + vit[2:]", "has no stitch yet; call add_stitch"),
    ],
)
def test_bad_routes(pair, route, message):
    before = pair.active_route
    with pytest.raises(ValueError, match=message):
        pair.set_route(route)
    assert pair.active_route == before


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(2, 3, SIZE, SIZE + 1), ValueError),
        (torch.zeros(3, SIZE, SIZE), ValueError),
        (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), TypeError),
        ([[0.0]], TypeError),
    ],
)
def test_bad_images(pair, images, error):
    with pytest.raises(error, match="pixel_values must"):
        pair(images)
    if isinstance(images, torch.Tensor) and images.dim() > 3:  # a list of images (3, H, W) are images
        with pytest.raises(error, match="pixel_values must"):
            pair.fit_stitches([images])


def test_select_fit_profile_budget(pair, images):
    routes = pair.select_stitches(images, max_routes=3)
    assert len(routes) == 3 and pair.active_route == max(routes, key=pair.similarity.value)
    assert pair.similarity.values.shape == (6, 3)
    r2 = pair.fit_stitches(images)
    assert r2.keys() == set(pair.stitches) and all(value <= 1 for value in r2.values())
    with pytest.raises(BudgetError, match="call profile"):
        pair.set_budget(macs=1e9)
    profile = pair.profile([(images, torch.zeros(len(images), dtype=torch.long))], metadata={"dataset": "noise"})
    assert [row.route for row in profile.routes] == list(pair.all_routes)
    assert profile.metadata["dataset"] == "noise" and profile.metadata["images"] == 6
    cheapest = min(row.costs["macs"] for row in profile.routes)
    assert pair.set_budget(macs=cheapest) == pair.active_route
    with pytest.raises(BudgetError, match=f"the cheapest is .* with macs={cheapest:g}"):
        pair.set_budget(macs=cheapest - 1)
    with pytest.raises(BudgetError, match="no latency_ms"):
        pair.set_budget(latency_ms=3)
    costs = pair.profile().routes
    assert [row.costs for row in costs] == [row.costs for row in profile.routes] and not costs[0].scores


def test_bad_calibration(pair):
    state = copy.deepcopy(pair.state_dict())
    with pytest.raises(ValueError, match="calibration is empty"):
        pair.fit_stitches(torch.zeros(0, 3, SIZE, SIZE))
    with pytest.raises(ValueError, match="calibration is empty"):
        pair.select_stitches([])
    bad = torch.full((8, 3, SIZE, SIZE), float("nan"))
    with pytest.raises(ValueError, match="hold NaN"):
        pair.fit_stitches(bad)
    with pytest.raises(ValueError, match="hold NaN"):
        pair.select_stitches(bad)
    with pytest.raises(ValueError, match="method='magic' is not one of"):
        pair.select_stitches(bad, method="magic")
    assert all(torch.equal(value, state[key]) for key, value in pair.state_dict().items())
    assert len(pair.routes) == 1
    empty = build(make_anchor("resnet"), make_anchor("vit"))
    with pytest.raises(ValueError, match="no stitches to fit"):
        empty.fit_stitches(torch.zeros(4, 3, SIZE, SIZE))


def test_a_stitch_exists_with_other_options(pair):
    route, parts = pair.routes[0], len(pair.stitches)
    assert pair.add_stitch(route) == pair.add_stitch(route, StitchConfig()) == route
    for config in (StitchConfig("mlp"), StitchConfig(class_token="learn")):
        with pytest.raises(ValueError, match="'resnet.*' exist with .*resnet_3__vit_2.*, not .*delete_stitch"):
            pair.add_stitches(["resnet[:2] + vit[1:]", route], config)
    assert pair.routes == (route,) and len(pair.stitches) == parts
    pair.add_stitches(["resnet[:3] +second vit[2:]"], StitchConfig("mlp"))
    pair.select_stitches(torch.randn(4, 3, SIZE, SIZE), max_routes=9)  # takes existing stitches as they are


def unfitted_warnings(caplog):
    found = [line for line in caplog.messages if "neither fitted nor trained" in line]
    caplog.clear()
    return found


def test_an_unfitted_stitch_is_warned_of_once(pair, images, caplog, tmp_path):
    """Where it runs, is profiled or saved; not after a fit, nor in a training loop of one's own."""
    labelled = [(images, torch.zeros(len(images), dtype=torch.long))]
    uses = [lambda model: model(images), lambda model: model.profile(labelled)]
    uses += [lambda model: model.save_pretrained(tmp_path)]
    for use in uses:
        model = copy.deepcopy(pair)
        use(model)
        assert "['resnet_3__vit_2']" in "".join(unfitted_warnings(caplog))
        for again in uses:
            again(model)
        assert not unfitted_warnings(caplog)
    own_loop, fitted, loaded = (copy.deepcopy(pair) for _ in range(3))
    own_loop.train()(images, labels=torch.zeros(6, dtype=torch.long)).loss.backward()
    fitted.fit_stitches(images)
    loaded.load_state_dict(pair.state_dict())
    for model in (own_loop.eval(), fitted, loaded):
        model(images)
    model.add_stitch("resnet[:2] + resnet[3:]", StitchConfig("branch"))
    model(images, route="resnet[:2] + resnet[3:]")  # a copy of a block
    assert not unfitted_warnings(caplog)
    model.add_stitch("resnet[:2] + vit[1:]")
    model(images)
    assert not unfitted_warnings(caplog), "another route"
    model(images, route="resnet[:2] + vit[1:]")
    assert unfitted_warnings(caplog)


def test_self_stitch_is_the_anchor(images):
    """A stitch from an anchor to itself at the same cut, fitted, is the identity."""
    torch.manual_seed(0)
    model = build(make_anchor("resnet"), make_anchor("vit", 1))
    model.set_route(model.add_stitch("resnet[:4] + resnet[4:]"))
    assert model.fit_stitches(torch.randn(64, 3, SIZE, SIZE))["resnet_4__resnet_4"] == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        assert torch.allclose(model(images).logits, make_model("resnet")(images).logits, atol=1e-2)


def test_copies_and_dtypes(pair, images):
    twin = copy.deepcopy(pair)
    with torch.no_grad():
        assert torch.equal(twin(images).logits, pair(images).logits)
        twin.stitches["resnet_3__vit_2"].proj.weight.zero_()
        assert not torch.equal(twin(images).logits, pair(images).logits)
        half = pair.to(torch.bfloat16)
        assert half(images).logits.dtype == torch.bfloat16


def test_anchors_can_be_used_again(images):
    """A model changes neither the anchors it is given nor other models of them."""
    front, end = make_anchor("resnet"), make_anchor("vit", 1)
    first = build(front, end)
    before = first(images).logits
    build(front, end, num_labels=2)
    assert torch.equal(first(images).logits, before) and not front.headless
    twice = build(front, front)
    assert list(twice.anchors) == ["resnet", "resnet_2"] and front.name == "resnet"


def test_dtypes_of_new_heads(images):
    model = build(make_anchor("resnet").to(torch.bfloat16), make_anchor("vit").to(torch.bfloat16), num_labels=2)
    model.set_route(model.add_stitch("resnet[:2] + vit[1:]"))
    assert model(images).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="weights of different types"):
        build(make_anchor("resnet").to(torch.bfloat16), make_anchor("vit"))


@pytest.mark.parametrize(
    "options",
    [{"num_labels": 0}, {"id2label": {1: "a", 2: "b"}}, {"num_labels": 3, "id2label": {0: "a"}}, {"id2label": {}}],
)
def test_bad_labels(options):
    with pytest.raises(ValueError, match="num_labels"):
        build(make_anchor("resnet"), make_anchor("vit"), **options)


def test_bad_label_names():
    with pytest.raises(ValueError, match="'resnet' has 5 classes, but 2 label_names"):
        build(named("resnet", NAMES[:2]), named("vit", NAMES[:2]))


def test_profile_is_not_kept_past_its_stitches(pair, images):
    pair.profile()
    second = pair.add_stitch("resnet[:2] + vit[1:]")
    pair.profile()
    pair.delete_stitch(second)
    assert second not in [row.route for row in pair.profiled.routes]
    pair.fit_stitches(images)
    assert pair.profiled is None
    with pytest.raises(ValueError, match="labels run from 0 to 99"):
        pair.profile([(images, torch.tensor([0, 1, 2, 3, 4, 99]))])


def elastic(name, **options):
    """A model out of one classifier, made elastic by AdaptiveNet's branches."""
    return build(make_anchor(name), routes="skip", **options)


def jiggle(model, seed=0):
    """Other stitches than those that are made."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.stitches.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return model


@pytest.mark.parametrize(("name", "routes"), [("resnet", 12), ("vit", 1), ("swin", 12), ("registers", 1)])
@torch.no_grad()
def test_one_anchor_is_enough(name, routes, images):
    """Six cuts give 13 compositions of five into 1, 2 and 3, three give two: one is the anchor alone."""
    model = jiggle(elastic(name))
    anchor = model.anchors[name]
    assert len(model.routes) == routes and len(model.all_routes) == routes + 1
    assert torch.equal(model(images).logits, anchor(images))
    for route in model.routes:
        model.set_route(str(route))
        x, first = images, route.segments[0]
        x = anchor(x, 0, first.stop)
        for point, segment in zip(route.stitch_points, route.segments[1:], strict=True):
            x = model.stitches[point.name](x)
            x = anchor(x, segment.start, segment.stop) if segment.start != segment.stop else x
        assert torch.equal(model(images).logits, x)
        assert torch.equal(model.bake()(images), x)
        assert not torch.equal(x, anchor(images))


def test_one_anchor_without_routes(images):
    model = build(make_anchor("vit"))
    assert not model.routes and torch.equal(model(images).logits, make_model("vit")(images).logits)
    with pytest.raises(ValueError, match=r"there is one anchor, and similarity joins two; add_family\('skip'\)"):
        model.select_stitches(torch.randn(8, 3, SIZE, SIZE))
    assert str(model.add_family("skip")[0]) == "vit[:1] + vit[3:]"


def by_hand(anchor, route, stitches):
    """MACs and parameters from those of single blocks and of single stitches, each counted by torch itself."""
    macs = params = 0
    for segment in route.segments:
        stops = [*range(segment.start + 1, anchor.depth + 1), None]
        for start, stop in enumerate(stops, segment.start):
            if segment.stop is not None and start >= segment.stop:
                break
            x = images_or_activation(anchor, start)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                anchor(x, start, stop)
            macs += counter.get_total_flops() // 2
    for point in route.stitch_points:
        stitch = stitches[point.name]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            stitch(images_or_activation(anchor, point.source_cut))
        macs += counter.get_total_flops() // 2
        params += sum(p.numel() for p in stitch.parameters())
    inside = {p for segment in route.segments if segment.start != segment.stop
              for p in anchor.own_parameters(segment.start, segment.stop).values()}  # fmt: skip
    return macs, params + sum(p.numel() for p in inside)


def images_or_activation(anchor, cut):
    return torch.zeros(1, 3, SIZE, SIZE) if cut == 0 else torch.zeros(anchor.layout(cut).shape(1))


def test_costs_of_routes_that_skip():
    """Sums by hand; predicted before there are stitches, profiled, and of the baked route."""
    model = elastic("resnet")
    predicted = build(make_anchor("resnet"), make_anchor("vit"), order="given").route_costs(StitchConfig("branch"))
    profile = model.profile()
    assert len(profile.routes) == 13
    for row in profile.routes:
        macs, params = by_hand(model.anchors["resnet"], row.route, model.stitches)
        known = {name: row.costs[name] for name in ("macs", "params")}
        assert known == {"macs": macs, "params": params} == predicted(row.route)
        assert sum(p.numel() for p in model.bake(row.route).parameters()) == params
    whole, *others = profile.routes
    assert all(row.costs["macs"] < whole.costs["macs"] for row in others)
    assert not any(key.startswith("vit") for key in model.stitches)


def test_budget_of_one_anchor(images):
    """Profiled with accuracies, the best route within a budget is the one that the table says."""
    model = jiggle(elastic("resnet"))
    profile = model.profile([(images, torch.arange(6) % CLASSES)])
    macs = sorted(row.costs["macs"] for row in profile.routes)
    limit = macs[len(macs) // 2]
    chosen = model.set_budget(macs=limit)
    fitting = [row for row in profile.routes if row.costs["macs"] <= limit]
    assert max(row.scores["accuracy"] for row in fitting) == next(
        row.scores["accuracy"] for row in fitting if row.route == chosen
    )
    with torch.no_grad():
        for row in profile.routes:
            model.set_route(row.route)
            hits = (model(images).logits.argmax(1) == torch.arange(6) % CLASSES).double().mean().item()
            assert row.scores["accuracy"] == pytest.approx(hits)
    with pytest.raises(BudgetError, match="the cheapest is"):
        model.set_budget(macs=macs[0] - 1)


def test_thousands_of_routes_of_few_stitches():
    """As many as AdaptiveNet's ResNet-50 has behind its first block: made, profiled and switched in seconds."""
    network = spread(timm.create_model("resnet50", num_classes=CLASSES, channels=(4, 4, 8, 8)))
    start = time.perf_counter()
    model = build(Anchor(network, "r50", Preprocessing((SIZE, SIZE))), routes="skip")
    assert len(model.routes) == len({*model.routes}) == 5_767 and len(model.stitches) == 14 + 13
    assert time.perf_counter() - start < 30
    branches = sum(p.numel() for p in model.stitches.parameters())
    assert branches < 30 * sum(p.numel() for p in network.parameters()) / 16 * 3
    start = time.perf_counter()
    for route in model.routes[::100]:
        model.set_route(route)
    assert time.perf_counter() - start < 5
    start = time.perf_counter()
    model.set_route("r50[:]")
    model.delete_stitch(model.routes[7])
    assert len(model.routes) == 5_766 and len(model.stitches) == 27 and time.perf_counter() - start < 10


def test_routes_of_a_family_within_limits():
    """Budgets and a number of routes, the stitches of these alone."""
    model = build(make_anchor("resnet"), routes="skip")
    whole = model.profile(routes=["resnet[:]"]).routes[0].costs["macs"]
    again = build(make_anchor("resnet"), make_anchor("vit", 1))
    few = again.add_family("skip", max_routes=4)
    assert len(few) == 4 and {point.name for route in few for point in route.stitch_points} == set(again.stitches)
    third = build(make_anchor("resnet"), make_anchor("vit", 1))
    cheap = third.add_family("skip", budget={"macs": 0.7 * whole}, merge=(2,))
    assert cheap and all(third.route_costs()(route)["macs"] <= 0.7 * whole for route in cheap)
    assert all(p.target_cut - p.source_cut == 2 for route in cheap for p in route.stitch_points)
    with pytest.raises(ValueError, match="no route of family 'skip'"):
        third.add_family("skip", budget={"macs": 1})
    with pytest.raises(ValueError, match="max_routes=0 must be at least 1"):
        third.add_family("skip", max_routes=0)
    with pytest.raises(ValueError, match=r"has no options \['kernel'\]"):
        third.add_family("skip", kernel=2)


@torch.no_grad()
def test_pruned_copies_in_a_model(images):
    """Every block that has hidden channels may run slimmer; the routes say so, and cost less."""
    model = build(make_anchor("mobilenet"), make_anchor("vit"), order="given")
    routes = model.add_family("skip", merge=(), prune=(0.25, 0.5), prunable={"mobilenet": (2, 4)}, max_routes=6)
    name = {point.name for route in routes for point in route.stitch_points}
    assert name == set(model.stitches) and any("~prune50_" in each for each in name)
    alone = {
        row.route.segments[0].anchor: row.costs for row in model.profile(routes=["mobilenet[:]", "vit[:]"]).routes
    }
    for row in model.profile(routes=routes).routes:
        whole = alone[row.route.segments[0].anchor]
        assert row.costs["macs"] < whole["macs"] and row.costs["params"] < whole["params"]
        model.set_route(row.route)
        assert torch.equal(model.bake()(images), model(images).logits)
        assert Route.parse(str(row.route)) == row.route


def test_shared_stitches_are_one_module(images):
    """Three routes through one stitch: one set of weights in memory, trained and fitted together."""
    model = build(make_anchor("resnet"), make_anchor("vit", 1))
    texts = ["resnet[:2] +both vit[2:]", "resnet[:3] +both vit[2:]", "resnet[:3] +both vit[3:]"]
    routes = model.add_stitches(texts)
    assert set(model.stitches) == set(model.config.stitches) == {"resnet__vit~both"}
    assert model.config.routes == texts and [str(route) for route in routes] == texts
    steps = [next(step for step in model.steps(route) if step.name == "resnet__vit~both") for route in routes]
    assert len({id(step.module) for step in steps}) == 1
    r2 = model.fit_stitches(torch.randn(40, 3, SIZE, SIZE))
    assert (
        r2.keys() == {"resnet__vit~both"} and model.config.stitches["resnet__vit~both"]["r2"] == r2["resnet__vit~both"]
    )
    resnet, vit = model.anchors["resnet"], model.anchors["vit"]
    stitch = model.stitches["resnet__vit~both"]
    profile = model.profile([(images, torch.zeros(6, dtype=torch.long))])
    with torch.no_grad():
        for row, (stop, start) in zip(profile.routes[2:], ((2, 2), (3, 2), (3, 3)), strict=True):
            model.set_route(row.route)
            logits = vit(stitch(resnet(images, 0, stop)), start)
            assert torch.equal(model(images).logits, logits) and torch.equal(model.bake()(images), logits)
            assert row.scores["accuracy"] == pytest.approx((logits.argmax(1) == 0).double().mean().item())
    alone = model.add_stitch("resnet[:3] + vit[2:]")
    assert model.stitches[alone.stitch_points[0].name] is not stitch, "a stitch without a name is the place's own"


def test_a_shared_stitch_goes_with_its_last_route(images):
    model = build(make_anchor("resnet"), make_anchor("vit", 1))
    routes = model.add_stitches(["resnet[:2] +both vit[2:]", "resnet[:3] +both vit[2:]", "resnet[:3] + vit[1:]"])
    model.set_route(routes[1])
    before = model(images).logits
    model.delete_stitch(routes[0])
    assert set(model.stitches) == {"resnet__vit~both", "resnet_3__vit_1"}
    assert torch.equal(model(images).logits, before)
    with pytest.raises(ValueError, match="is the active route"):
        model.delete_stitch(routes[1])
    model.set_route(routes[2])
    model.delete_stitch(routes[1])
    assert set(model.stitches) == set(model.config.stitches) == {"resnet_3__vit_1"}


@pytest.mark.parametrize(
    ("route", "kind"),
    [("resnet[:4] +both vit[2:]", "linear"), ("resnet[:1] +both vit[2:]", "linear"), ("vit[:4] +both vit[2:]", "mlp")],
)
def test_layouts_that_cannot_be_shared(route, kind):
    """8x8 and 16x16 or 4x4 positions need stitches of their own; nothing is added."""
    model = build(make_anchor("resnet"), make_anchor("vit", 1))
    model.add_stitch("resnet[:2] +both vit[2:]")
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=r"stitch 'resnet__vit~both' was made for|'vit' has cuts 1 to 3, not 4"):
        model.add_stitch(route, StitchConfig(kind))
    assert model.config.to_dict() == before and set(model.stitches) == {"resnet__vit~both"}


def test_families_of_two_anchors():
    """SN-Net's own rules in a model: shared stitches, fitted together; kept stages apart."""
    model = build(make_anchor("swin"), make_anchor("swin_nhwc", 1))
    with pytest.raises(ValueError, match="stages"):
        list(model.family("paired"))
    twins = build(make_anchor("resnet"), make_anchor("resnet", 1))
    routes = twins.add_family("paired")
    # stages of 1, 2, 2 and 1 blocks and no entry: windows (0, 1), (1, 1) in the two of two
    assert [str(r) for r in routes] == [
        f"{a}[:{cut + late}] +w{cut} {b}[{cut}:]"
        for a, b in [[r.anchor for r in routes[0].segments]]
        for cut in (2, 4)
        for late in (0, 1)
    ]
    assert len(twins.stitches) == 2 and twins.fit_stitches(torch.randn(16, 3, SIZE, SIZE)).keys() == set(
        twins.stitches
    )


def test_mobilenet_to_efficientnet_lite(tmp_path):
    """Other mean and std, and 224 to 240 pixels, as timm's own folders say."""
    names = ("mobilenetv2_100", "tf_efficientnet_lite1")
    for name in names:
        save_for_hf(spread(timm.create_model(name, num_classes=4)), tmp_path / name, safe_serialization=True)
    front, end = (load_anchor(tmp_path / name) for name in names)
    assert (front.preprocessing.image_size, end.preprocessing.image_size) == ((224, 224), (240, 240))
    assert front.preprocessing.mean == (0.485, 0.456, 0.406) and end.preprocessing.mean == (0.5, 0.5, 0.5)
    model = build(front, end)
    model.set_route("tf_efficientnet_lite1[:]")
    colour = torch.tensor([0.2, 0.7, 0.4]).view(1, 3, 1, 1)
    given = (colour - torch.tensor(front.preprocessing.mean).view(3, 1, 1)) / torch.tensor(
        front.preprocessing.std
    ).view(3, 1, 1)
    wanted = ((colour - 0.5) / 0.5).expand(1, 3, 240, 240)
    with torch.no_grad():
        found = model(given.expand(1, 3, 224, 224)).logits
        assert torch.allclose(found, end.logits(wanted), atol=1e-4)
        model.set_route(model.add_stitch("mobilenetv2_100[:5] + tf_efficientnet_lite1[7:]"))
        assert model(torch.randn(1, 3, 224, 224)).logits.shape == (1, 4)


def test_labels_that_are_ignored(pair, images):
    """-100, as in the losses of torch and transformers: in the loss and in the accuracy."""
    labels = torch.arange(len(images)) % CLASSES
    some = labels.clone()
    some[::2] = -100
    with torch.no_grad():
        expected = pair(pixel_values=images[1::2], labels=labels[1::2]).loss
        assert torch.allclose(pair(pixel_values=images, labels=some).loss, expected, atol=1e-6)
    pair.fit_stitches(images)
    whole = pair.profile([(images[1::2], labels[1::2])])
    part = pair.profile([(images, some), (images[:2], torch.full((2,), -100))])
    assert [row.scores for row in part.routes] == [row.scores for row in whole.routes]
    assert part.metadata["images"] == whole.metadata["images"] == 3
    scorer = Scorer(pair, [(images[:2], torch.full((2,), -100)), (images, some)], 2, exact=True)
    assert scorer.score == "accuracy" and sum(len(batch["labels"]) for batch in scorer._batches()) == 3
    pair.select_stitches([(images.repeat(9, 1, 1, 1), some.repeat(9))], max_routes=1, method="kl_probe")
    with pytest.raises(ValueError, match="every image has the label -100"):
        pair.profile([(images, torch.full((len(images),), -100))])
    for wrong in (-1, CLASSES):
        with pytest.raises(ValueError, match="but the model has 5 classes"):
            pair(pixel_values=images[:2], labels=torch.tensor([-100, wrong]))


def test_problem_types(pair, images):
    """One class for each image, or several as the Trainer of transformers learns them; numbers are refused."""
    one_hot = nn.functional.one_hot(torch.arange(len(images)) % CLASSES, CLASSES).float()
    wanted = nn.functional.binary_cross_entropy_with_logits(pair(images).logits, one_hot)
    for kind in (None, "multi_label_classification"):
        pair.config.problem_type = kind
        assert pair(pixel_values=images, labels=one_hot).loss == wanted
    with pytest.raises(ValueError, match=r"must have shape \(N, 5\), not \(6, 4\)"):
        pair(pixel_values=images, labels=one_hot[:, :4])
    for use in (lambda: pair.profile([(images, one_hot)]), lambda: train(pair, TensorDataset(images, one_hot))):
        with pytest.raises(ValueError, match="need transformers' Trainer and problem_type="):
            use()
    pair.config.problem_type = None
    for labels in (torch.rand(len(images)), torch.rand(len(images), 1, 1)):
        with pytest.raises(ValueError, match="labels must be class indices"):
            pair(pixel_values=images, labels=labels)
    pair.config.problem_type = "regression"
    for use in (lambda: pair(pixel_values=images, labels=one_hot), lambda: type(pair)(pair.config)):
        with pytest.raises(ValueError, match="problem_type='regression', which is .*: the model only classifies"):
            use()
    one = build(make_anchor("resnet"), make_anchor("vit", 1), num_labels=1)
    with pytest.raises(ValueError, match="num_labels=1 means to transformers"):
        one(pixel_values=images, labels=torch.rand(len(images), 1))
