"""A tuned anchor is a route: it learns what the anchor itself would, and the anchor stays as it was to the bit."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_anchor
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from trainings import FAST, ROUTES, build, data, trained
from versions import needs_export

from restnet_hf import Budget, StitchedModelForImageClassification, TrainArgs, train, train_heads
from restnet_hf.adaptation.adapt import adapt
from restnet_hf.adaptation.neighbours import Neighbours
from restnet_hf.adaptation.surrogate import route_features
from restnet_hf.export.export import export_routes
from restnet_hf.hub.cards import make_card
from restnet_hf.profiling import timing
from restnet_hf.routes.route import Route, TunedKey
from restnet_hf.runtime.exported_model import ExportedModel
from restnet_hf.stitches.norms import is_norm
from restnet_hf.stitches.tuning import SHARED_KINDS, TUNINGS, TunedConfig, tuned_keys
from restnet_hf.training.learner import KINDS, Learner
from restnet_hf.training.samplers import SAMPLERS


TUNED = "tuned vit[:]"
NEW = {"num_labels": 3}


def both(**options):
    """Two stitched routes, and both anchors tuned."""
    model = build(**options)
    model.add_stitches([TUNED, "tuned resnet[:]"])
    return model


def logits(model, images, route):
    with torch.no_grad():
        return model(images, route=route).logits


def frozen(model, images):
    """The anchors' weights, and their logits as routes."""
    weights = {key: value.clone() for key, value in model.anchors.state_dict().items()}
    return weights, {name: logits(model, images, f"{name}[:]") for name in model.anchors}


def equal(one, other):
    return all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("tuning", "options"),
    [
        pytest.param(tuning, options, marks=[pytest.mark.slow] * (bool(options) and tuning != "norm"))
        for tuning in KINDS
        for options in ({}, NEW)
    ],
)
def test_what_trains(tuning, options, images, tmp_path):
    """Its head always, and what the option names; saved and loaded, baked and deleted, as any route."""
    model, rows = both(**options), data(classes=options.get("num_labels", CLASSES))
    if options:
        train_heads(model, rows, TrainArgs(num_train_epochs=1))
    weights, before = frozen(model, images)
    assert torch.equal(logits(model, images, TUNED), before["vit"]), "equal at first"
    train(model, rows, TrainArgs(tuning=tuning, train_head=False, **FAST))
    weights_after, after = frozen(model, images)
    assert equal(weights, weights_after) and equal(before, after)
    kinds = {TunedKey.parse(key).kind for key in model.tuned}
    assert kinds == set(KINDS[tuning]) - ({"head"} if options else set())
    assert {*model.heads} == ({"resnet", "vit", "tuned~resnet", "tuned~vit"} if options else set())
    found = {str(route): logits(model, images, route) for route in model.routes}
    for route in (TUNED, "tuned resnet[:]"):
        anchor = model.route(route).segments[0].anchor
        assert not torch.allclose(found[route], before[anchor], atol=1e-4)
        assert torch.allclose(model.bake(route)(images), found[route], atol=1e-5)
    model.set_route(TUNED)
    model.save_pretrained(tmp_path)
    given = {name: copy.deepcopy(anchor.model) for name, anchor in model.anchors.items()}
    again = StitchedModelForImageClassification.from_pretrained(tmp_path, anchors=given)
    assert again.active_route == model.route(TUNED) and again.routes == model.routes
    assert all(torch.equal(logits(again, images, route), value) for route, value in found.items())
    other = build(**options)
    other.load_stitch(tmp_path, "night")
    assert all(torch.equal(logits(other, images, f"night: {route}"), value) for route, value in found.items())
    again.prune_to([TUNED])
    assert again.routes == (Route.parse(TUNED),) and torch.equal(logits(again, images, TUNED), found[TUNED])
    again.set_route("vit[:]")
    again.delete_stitch(TUNED)
    assert not again.tuned and not again.config.tuned and "tuned~vit" not in again.heads


@pytest.mark.parametrize("kind", TUNINGS)
def test_each_kind_of_tensor(kind, images):
    """What routes share, tuned anchors share too; the rest is of the one route."""
    model = both()
    model.add_stitch("vit[:1] + resnet[3:]")
    before = {str(route): logits(model, images, route) for route in model.all_routes}
    key = next(key for key in tuned_keys(model.route(TUNED))[0] if key.kind == kind)
    assert str(key) == f"{kind}-{'vit' if kind in SHARED_KINDS else 'tuned~vit'}"
    tuned = model.add_tuned(key, TunedConfig(kind, "vit"))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1)
    changed = {name for name, value in before.items() if not torch.equal(logits(model, images, name), value)}
    stitched = {name for name in before if "+" in name}
    assert changed == ({TUNED, *stitched} if kind in SHARED_KINDS else {TUNED})
    steps = model.steps(TUNED)
    assert steps[-1].tuned == (tuned,) and torch.allclose(model.bake(TUNED)(images), logits(model, images, TUNED))


def loss_of(scores, labels, taught):
    """Half cross-entropy, half distillation at temperature 2, from their definitions."""
    p, q = (taught / 2).log_softmax(1), (scores / 2).log_softmax(1)
    return 0.5 * cross_entropy(scores, labels) + 0.5 * 4 * kl_div(q, p, reduction="batchmean", log_target=True)


def by_hand(model, images, labels, taught, groups, steps):
    """Plain AdamW with a cosine, norms and head clipped apart; all else of the network frozen, in evaluation mode."""
    parameters = [p for group in groups for p in group]
    for parameter in (*model.parameters(), *parameters):
        parameter.requires_grad_(any(parameter is each for each in parameters))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss_of(model(images), labels, taught).backward()
        for group in groups:
            nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()


@pytest.mark.parametrize("options", [{}, NEW])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_learns_what_the_anchor_itself_would(name, options):
    """A copy of the anchor, its norms and head trained by hand in the same way, ends with the same weights."""
    model, rows = both(**options), data(classes=options.get("num_labels", CLASSES))
    if options:
        train_heads(model, rows, TrainArgs(num_train_epochs=1))
    images, labels = rows.tensors
    route = f"tuned {name}[:]"
    network = copy.deepcopy(model.anchors[name].model)
    path = model.anchors[name].search_result.classifier
    head = network.get_submodule(path)
    if options:
        parent, _, leaf = path.rpartition(".")
        head = copy.deepcopy(model.heads[name])
        setattr(network.get_submodule(parent), leaf, head)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x).logits

    taught = logits(model, images, "resnet[:]")
    norms = [p for module in network.modules() if is_norm(module) for p in module.parameters(recurse=False)]
    by_hand(Logits(), images, labels, taught, [norms, [*head.parameters()]], 3)
    args = {"num_train_epochs": 3, "batch_size": len(rows), "learning_rate": 1e-2, "warmup_ratio": 0}
    args |= {"teacher": "resnet", "keep": "last"}
    train(model, rows, TrainArgs(tuning="norm", **args), [route])
    state, tuned = network.state_dict(), model.tuned[f"norm-tuned~{name}"]
    found = tuned.tensors(model.anchors[name])
    assert len(found) == len(norms) + sum(key.endswith(("running_mean", "running_var")) for key in state)
    for key, value in found.items():
        assert torch.allclose(value, state[key], atol=1e-4), key
        if "running" in key:  # the images are those that the anchor knows
            assert torch.equal(value, model.anchors[name].model.state_dict()[key])
    own = model.heads[f"tuned~{name}"] if options else model.tuned[f"head-tuned~{name}"].own
    weights = own.weight if options else own[f"{path}.weight".replace(".", "/")]
    assert torch.allclose(weights, head.weight, atol=1e-4)
    assert torch.allclose(logits(model, images, route), Logits()(images), atol=1e-3)


@pytest.mark.parametrize("tuning", ["stitch", "norm"])
def test_trains_beside_others_as_it_does_alone(tuning, tmp_path):
    """Nothing but the place in the loop is shared; from disk it is the same but for half precision."""
    args = {"tuning": tuning, **FAST}
    alone, beside, cached = both(), both(), both()
    train(alone, data(), TrainArgs(**args), [TUNED])
    losses = train(beside, data(), TrainArgs(**args)).losses
    kept = train(cached, data(), TrainArgs(cache_dir=str(tmp_path), **args)).losses
    own = {name: value for name, value in trained(alone).items() if name.startswith("tuned.")}
    assert own and all(torch.allclose(value, trained(beside)[name], atol=1e-6) for name, value in own.items())
    assert kept == pytest.approx(losses, rel=0.02) and {TUNED, *ROUTES} <= {*losses}
    names = {file.name for file in tmp_path.glob("*/*.bin")}
    assert ("images.bin" in names) == (tuning == "norm"), "a head needs the features alone"


def test_the_head_learns_from_frozen_features():
    """Only what is behind the last cut runs with gradients, and the rest once for all routes."""
    model = both()
    job = Learner(model, [TUNED, ROUTES[0]], TrainArgs(distillation=0))
    depth = model.anchors["vit"].depth
    route = job.routes[0]
    assert job.frozen.front(route) == f"front-vit-{depth}"
    (step,) = job.rest[route]
    assert (step.segment.start, step.segment.stop) == (depth, None)
    assert [name for name in job.parameters if name.startswith("tuned.")] == [
        "tuned.head-tuned~vit.own.classifier/weight",
        "tuned.head-tuned~vit.own.classifier/bias",
    ]
    model.add_tuned("norm-tuned~vit", TunedConfig("norm", "vit"))  # from an earlier training
    assert Learner(model, [TUNED], TrainArgs(distillation=0)).frozen.front(route) == "images"


@pytest.mark.parametrize(
    "sampler", ["all", *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS if name != "all")]
)
def test_every_sampler_and_matching(sampler, caplog):
    """While stitched routes match features it learns the task already, and that is said."""
    model = both()
    args = TrainArgs(sampler=sampler, tuning="norm", matching_epochs=2, **FAST)
    with caplog.at_level("WARNING"):
        result = train(model, data(), args)
    assert f"['{TUNED}', 'tuned resnet[:]'] have no features to match: they learn the task" in caplog.text
    assert result.steps == 12 and model.config.training[-1]["stage"] == "training"
    for options in ({"num_train_epochs": 0}, {"routes": [TUNED]}, {"routes": [ROUTES[0], "vit[:]"]}):
        routes = options.pop("routes", None)
        with pytest.raises(ValueError, match="anchors alone have nothing to match"):
            train(model, data(), TrainArgs(**{**FAST, "matching_epochs": 1, **options}), routes)


@pytest.mark.parametrize("options", [{}, NEW])
@pytest.mark.parametrize("tuning", ["stitch", "norm"])
def test_keeps_the_best_it_had(tuning, options):
    """On held-out images it never ends below where it began, which is where the anchor is."""
    model, rows = both(**options), data(48, options.get("num_labels", CLASSES))
    if options:
        train_heads(model, rows, TrainArgs(num_train_epochs=1))
    held = data(24, options.get("num_labels", CLASSES))
    before = {name: model.profile(held, [f"{name}[:]"]).routes[0].scores["accuracy"] for name in model.anchors}
    args = TrainArgs(tuning=tuning, matching_epochs=1, num_train_epochs=2, batch_size=8, learning_rate=0.3)
    result = train(model, rows, args, validation=held)
    for name in model.anchors:
        scores = result.scores[f"tuned {name}[:]"]
        assert (
            scores.metric == "accuracy" and scores.start == pytest.approx(before[name]) and scores.best >= scores.start
        )
        measured = model.profile(held, [f"tuned {name}[:]"]).routes[0].scores["accuracy"]
        assert measured == pytest.approx(scores.best)


def test_untrained_heads():
    """They are trained first, on the frozen anchor; the tuned one begins with what comes out, once."""
    model, rows = both(**NEW), data(classes=3)
    train_heads(model, rows, TrainArgs(num_train_epochs=1))
    assert model.config.trained_heads == ["resnet", "tuned~resnet", "tuned~vit", "vit"]
    assert equal(model.heads["vit"].state_dict(), model.heads["tuned~vit"].state_dict())
    train(model, rows, TrainArgs(**FAST), [TUNED])
    own = copy.deepcopy(model.heads["tuned~vit"].state_dict())
    train(model, rows, TrainArgs(**{**FAST, "distillation": 0.0}, train_head=True), ["vit[:]"])
    assert equal(own, model.heads["tuned~vit"].state_dict()) and not equal(own, model.heads["vit"].state_dict())
    fresh = both(**NEW)
    train(fresh, rows, TrainArgs(num_train_epochs=1, batch_size=24, distillation=0.0, keep="last"), [TUNED])
    assert fresh.config.trained_heads == ["tuned~vit", "vit"]


def test_a_failed_training_leaves_nothing(images):
    model = both(**NEW)
    before, weights = dict(model.config.tuned), trained(model)
    rows = data(classes=3)
    rows.tensors[0][5] = float("nan")
    with pytest.raises(ValueError, match="the loss of route"):
        train(model, rows, TrainArgs(tuning="norm", **FAST))
    assert model.config.tuned == before and equal(weights, trained(model)) and not model.tuned


def test_an_anchor_without_norms(caplog):
    """Its head trains, and that is said."""
    model = StitchedModelForImageClassification.from_anchors(make_anchor("plain"), make_anchor("vit"), order="given")
    route = model.add_stitch("tuned plain[:]")
    model.add_stitch(TUNED)
    with caplog.at_level("WARNING"):
        train(model, data(), TrainArgs(tuning="norm", **FAST))
    assert "['tuned plain[:]'] have nothing of kind 'norm': only their heads train" in caplog.text
    assert {*model.tuned} == {"head-tuned~plain", "norm-tuned~vit", "head-tuned~vit"}
    with pytest.raises(ValueError, match="no route has anything of kind 'norm'"):
        train(model, data(), TrainArgs(tuning="norm", **FAST), [route])


def test_a_head_of_several_layers(images):
    """Where no single linear layer gives the logits, all weights behind the last cut are the head."""
    model = StitchedModelForImageClassification.from_anchors(make_anchor("distilled"), make_anchor("vit"))
    route = model.add_stitch("tuned distilled[:]")
    before = logits(model, images, "distilled[:]")
    train(model, data(), TrainArgs(**FAST), [route])
    names = {*model.tuned["head-tuned~distilled"].own}
    assert names == {"head/weight", "head/bias", "head_dist/weight", "head_dist/bias"}
    assert torch.equal(logits(model, images, "distilled[:]"), before)
    assert not torch.allclose(logits(model, images, route), before, atol=1e-4)


def test_costs_budgets_and_card():
    """It costs what the anchor does, and is chosen where it is the best."""
    model, rows = both(), data()
    train(model, rows, TrainArgs(tuning="norm", **FAST))
    profile = model.profile(rows)
    costs = {str(row.route): dict(row.costs) for row in profile.routes}
    for name in ("vit", "resnet"):
        own, tuned = costs[f"{name}[:]"], costs[f"tuned {name}[:]"]
        assert (own["macs"], own["params"]) == (tuned["macs"], tuned["params"])
        assert own["memory_mb"] < tuned["memory_mb"] < own["memory_mb"] + 1
    assert model.route_costs()(Route.parse(TUNED))["macs"] == costs[TUNED]["macs"]
    scores = {str(row.route): row.scores["accuracy"] for row in profile.routes}
    with torch.no_grad(), model.using(TUNED):
        right = model(rows.tensors[0]).logits.argmax(1) == rows.tensors[1]
        assert scores[TUNED] == pytest.approx(right.float().mean().item())
    model.record_profile([row for row in profile.routes if len(row.route.segments) == 1])
    assert str(model.set_budget(params=costs[TUNED]["params"])) == (
        TUNED if scores[TUNED] > scores["vit[:]"] else "vit[:]"
    )
    sources = [{"name": name, "repo_id": None, "revision": None, "license": None} for name in model.anchors]
    card = str(make_card("me/adapter", sources, model.profiled))
    assert f"`{TUNED}`" in card and "`tuned a[:]` is the anchor `a` with tuned weights" in card


def test_measured_and_searched(monkeypatch):
    """Its weights are read as they are on a device, and a search considers it beside the anchor."""
    monkeypatch.setattr(timing, "MAX_SPREAD", float("inf"))  # other tests run beside this one
    model, rows = both(), data()
    model.add_tuned("norm-tuned~vit", TunedConfig("norm", "vit"))
    latency = model.measure_latency([TUNED, "vit[:]"], seconds=0.1)
    assert latency.latency_ms(model.steps(TUNED)) > latency.latency_ms(model.steps("vit[:]"))
    found = adapt(model, rows, Budget(macs=1e12), search="evolution", max_evaluations=6)
    assert {each.route for each in found.rejected} | {found.best.route} == {*model.all_routes}
    numbers = Neighbours(model.all_routes)
    tuned, own = (model.all_routes.index(Route.parse(text)) for text in (TUNED, "vit[:]"))
    assert tuned in numbers.of(own) and [own] == [*numbers.of(tuned)]
    features = route_features(model.all_routes, np.ones((len(model.all_routes), 1)))
    assert not np.array_equal(features[tuned], features[own])


@pytest.mark.slow
@needs_export
@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_exported(runtime, images, tmp_path):
    model = both()
    train(model, data(), TrainArgs(tuning="norm", **FAST))
    export_routes(model, tmp_path / "out", [TUNED, "vit[:]"], runtime=runtime)
    exported = ExportedModel.from_pretrained(
        tmp_path / "out", **({"trust_remote_code": True} if runtime == "torch" else {})
    )
    for route in (TUNED, "vit[:]"):
        exported.set_route(route)
        assert torch.allclose(torch.as_tensor(exported(images.numpy())), logits(model, images, route), atol=1e-3)


def test_routes_that_are_not_there(images):
    model = build()
    with pytest.raises(ValueError, match=r"no route 'tuned vit\[:\]' yet; add_stitch\('tuned vit\[:\]'\) adds it"):
        model.set_route(TUNED)
    with pytest.raises(ValueError, match=r"only an anchor alone may be tuned, as in 'tuned vit\[:\]'"):
        model.add_stitch(f"tuned {ROUTES[0]}")
    assert model.route_costs()(Route.parse(TUNED)) == model.route_costs()(Route.parse("vit[:]"))
    route = model.add_stitch(TUNED)
    assert model.routes[-1] == route and model.all_routes[-1] == route and model.add_stitch(TUNED) == route
    assert len(model.routes) == 3
    model.set_route(route)
    with pytest.raises(ValueError, match="is the active route"):
        model.delete_stitch(route)
    new = build(**NEW)
    night = new.add_stitch("night: tuned vit[:]")
    assert {*new.heads} == {"resnet", "vit", "night:resnet", "night:vit", "night:tuned~vit"}
    assert new.route_costs()(Route.parse(TUNED))["macs"] == new.route_costs()(night)["macs"]
    new.delete_stitch("night")
    assert {*new.heads} == {"resnet", "vit"}
    with pytest.raises(ValueError, match="there are no stitches to fit"):
        new.fit_stitches(images, new.add_stitch(TUNED))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(routes=[]), "names anchors or stitches that are not there"),
        (lambda c: c["routes"].append("tuned other[:]"), "names anchors or stitches that are not there"),
        (lambda c: c["routes"].append("tuned vit[:2] + vit[3:]"), "only an anchor alone may be tuned"),
        (lambda c: c["tuned"]["head-tuned~vit"].update(anchor="other"), "the tuned entry 'head-tuned~vit' is invalid"),
        (lambda c: c["tuned"]["head-tuned~vit"].update(kind="norm"), "the tuned entry 'head-tuned~vit' is invalid"),
        (lambda c: c["tuned"].update({"head-vit 2": c["tuned"]["head-tuned~vit"]}), "the tuned entry 'head-vit 2'"),
        (lambda c: c["tuned"].pop("head-tuned~vit"), "tuned.head-tuned~vit"),
    ],
)
def test_untrusted_configs(tmp_path, change, message):
    model = build()
    for route in ROUTES:
        model.delete_stitch(route)
    model.set_route(model.add_stitch(TUNED))
    model.add_tuned("head-tuned~vit", TunedConfig("head", "vit"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {name: copy.deepcopy(anchor.model) for name, anchor in model.anchors.items()}
    with pytest.raises(ValueError, match=message):
        StitchedModelForImageClassification.from_pretrained(tmp_path, anchors=given)


def test_a_head_tuned_in_full_is_not_replaced():
    """Tuned in full, its head is among those weights; a later learner must not put a copy of the old one over it."""
    model = build()
    (route,) = model.add_stitches(["tuned vit[:]"])
    train(model, data(), TrainArgs(**FAST, tuning="full", distillation=0.0), [route])
    images = data().tensors[0]
    with torch.no_grad():
        before = model(images, route=route).logits
        Learner(model, [route], TrainArgs(distillation=0.0))
        assert torch.equal(model(images, route=route).logits, before)
    assert not [key for key in model.tuned if key.startswith("head")]
