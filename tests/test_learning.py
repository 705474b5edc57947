"""What trains by each kind of tuning, from what, and with which losses."""

from contextlib import nullcontext

import pytest
import torch
from conftest import CLASSES
from test_training import FAST, ROUTES, build, data, trained
from torch.utils.data import DataLoader

from restnet_hf import TrainArgs, train
from restnet_hf.feeding import first_images
from restnet_hf.frozen import FrozenPart, first_segment
from restnet_hf.learning import KINDS, Learner
from restnet_hf.objectives import goal_scales, matching_loss, task_loss
from restnet_hf.stitches import STITCHES, StitchConfig
from restnet_hf.training import _Training


BACK = "vit[:1] + resnet[3:]"


@pytest.mark.parametrize("tuning", KINDS)
def test_what_trains(tuning, images):
    """Stitches always; what is tuned by that kind alone; the anchors to the bit never."""
    model = build()
    model.add_stitch(BACK)
    with torch.no_grad():
        before = {name: anchor(images) for name, anchor in model.anchors.items()}
    frozen = {key: value.clone() for key, value in model.anchors.state_dict().items()}
    start = trained(model)
    train(model, data(), TrainArgs(tuning=tuning, **FAST))
    kinds = {key.split("-")[0] for key in model.tuned}
    wanted = set(KINDS[tuning]) - ({"bias"} if tuning == "lora" and not model.tuned else set())
    assert kinds == wanted
    after = trained(model)
    assert all(not torch.equal(after[name], value) for name, value in start.items())
    # what a tuned key holds has left what it was made from
    for tuned in model.tuned.values():
        anchor = model.anchors[tuned.config.anchor]
        tensors = tuned.tensors(anchor, tuned.config.start)
        state = anchor.model.state_dict()
        changed = [name for name, tensor in tensors.items() if not torch.equal(tensor, state[name])]
        assert len(changed) > 0.8 * len(tensors)
    assert all(torch.equal(value, frozen[key]) for key, value in model.anchors.state_dict().items())
    with torch.no_grad():
        assert all(torch.equal(anchor(images), before[name]) for name, anchor in model.anchors.items())


def test_rates_of_what_is_tuned():
    """A tenth for full tuning, as for stitches otherwise, and what was asked for."""
    for options, expected in (
        ({"tuning": "full"}, {1e-2: "stitches", 1e-3: "tuned"}),
        ({"tuning": "lora", "anchor_learning_rate": 3e-3}, {1e-2: "stitches", 3e-3: "tuned"}),
    ):
        job = _Training(build(), data(), TrainArgs(learning_rate=1e-2, warmup_ratio=0, **options), None)
        job._prepare()
        names = iter(job.learner.parameters)
        groups = {group["initial_lr"]: {next(names).split(".")[0] for _ in group["params"]}
                  for group in job.optimizer.param_groups}  # fmt: skip
        assert groups == {rate: {what} for rate, what in expected.items()}


def test_full_and_low_rank_do_not_go_together():
    model = build()
    train(model, data(), TrainArgs(tuning="lora", num_train_epochs=1, batch_size=24))
    with pytest.raises(ValueError, match=r"\['resnet', 'vit'\] were tuned in full or by low-rank updates before"):
        train(model, data(), TrainArgs(tuning="full", num_train_epochs=1, batch_size=24))


@pytest.mark.parametrize("kind", STITCHES)
def test_every_kind_of_stitch_trains(kind):
    model = build()
    for route in ROUTES:
        model.set_route("resnet[:]")
        model.delete_stitch(route)
        model.add_stitch(route, StitchConfig(kind=kind))
    first = train(model, data(), TrainArgs(least_squares_images=24, num_train_epochs=1, learning_rate=1e-9)).losses
    last = train(model, data(), TrainArgs(num_train_epochs=15, batch_size=8, learning_rate=1e-2)).losses
    assert all(last[route] < 0.8 * first[route] for route in ROUTES)


def test_losses_by_hand():
    """In float64, from the definitions."""
    generator = torch.Generator().manual_seed(0)
    logits, taught = (torch.randn(6, CLASSES, generator=generator) for _ in range(2))
    labels = torch.arange(6) % CLASSES
    p, q = (taught.double() / 3).softmax(1), (logits.double() / 3).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    truth = -logits.double().softmax(1)[torch.arange(6), labels].log().mean()
    found = task_loss(logits, labels, taught, 0.3, 3.0)
    assert found.item() == pytest.approx((0.7 * truth + 0.3 * 9 * divergence).item(), rel=1e-5)
    goals = {"a": torch.randn(8, 3, 2, 2, generator=generator) * 5, "b": torch.randn(8, 7, generator=generator)}
    mine = {name: goal + torch.randn(goal.shape, generator=generator) for name, goal in goals.items()}
    scales = goal_scales(goals)
    terms = []
    for name, goal in goals.items():
        rows = goal.double().flatten(1)
        variance = (rows - rows.mean(0)).square().sum(0) / 7
        assert scales[name] == pytest.approx(variance.mean().item(), rel=1e-6)
        terms.append((mine[name] - goal).double().square().mean() / variance.mean())
    assert matching_loss(mine, goals, scales).item() == pytest.approx(sum(terms).item() / 2, rel=1e-5)
    assert goal_scales({"same": torch.ones(4, 2)}) == {"same": 1.0}


@pytest.mark.parametrize("match", ["final", "later"])
def test_matching_by_hand(match):
    """A route's features after the end against the end anchor's own, at the head's input and at the later cuts."""
    model = build()
    job = Learner(model, ROUTES, TrainArgs(matching_epochs=1, match=match, num_train_epochs=0))
    fresh = job.begin()
    x, labels = data()[:8]
    job.look(lambda: iter([x]), fresh)
    losses = job.losses({"pixel_values": x, "labels": labels}, job.routes, True, False, nullcontext)
    found = {str(route): loss.item() for route, loss in zip(job.routes, losses, strict=True)}
    vit = model.anchors["vit"]
    for name in ROUTES:
        route = model.route(name)
        start = route.segments[-1].start
        with torch.no_grad():
            stitched = model.stitches[route.stitch_points[0].name](
                model.anchors["resnet"](x, 0, route.segments[0].stop)
            )
            later = range(start + 1, vit.depth + 1) if match == "later" else ()
            pairs = [(vit(stitched, start, cut), vit(x, 0, cut)) for cut in later]
            finals = [vit.capture(a, {None}, at, features=True)[None] for a, at in ((stitched, start), (x, 0))]
            assert torch.equal(vit.model.classifier(finals[1]), vit(x))
        terms = [
            (mine.double() - own.double()).square().mean() / own.double().flatten(1).var(0).mean()
            for mine, own in [*pairs, tuple(finals)]
        ]
        assert found[name] == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-4)


def test_matching_needs_no_labels_and_helps():
    """On images alone the features come closer, and heads do not move."""
    model = build(num_labels=3)
    images = [{"pixel_values": x} for x in data().tensors[0]]
    heads = {name: p.clone() for name, p in model.heads.named_parameters()}
    options = {"num_train_epochs": 0, "batch_size": 8, "match": "later"}
    first = train(model, images, TrainArgs(matching_epochs=1, learning_rate=1e-9, **options))
    last = train(model, images, TrainArgs(matching_epochs=10, learning_rate=1e-2, **options))
    assert all(last.losses[route] < 0.9 * first.losses[route] for route in ROUTES)
    assert all(torch.equal(value, heads[name]) for name, value in model.heads.named_parameters())
    with pytest.raises(ValueError, match="anchors alone have nothing to match"):
        train(model, images, TrainArgs(matching_epochs=1), routes=["resnet[:]"])


def test_frozen_networks_run_once(images):
    """Everything that two routes, their teacher and their goals need, from one run of each network and one more."""
    model = build(order="given")
    walks = {model.route(name): model.steps(name) for name in (*ROUTES, BACK) if model.add_stitch(name)}
    alone = {name: model.steps(f"{name}[:]") for name in model.anchors}
    before = {name: (s[: s.index(first_segment(s))], model.anchors[name]) for name, s in alone.items()}
    frozen = FrozenPart(walks, before, alone["resnet"], {"vit": {None, 3}, "resnet": {None, 5}})
    runs = {name: 0 for name in model.anchors}

    def count(name):
        def hook(*_):
            runs[name] += 1

        return hook

    for name, anchor in model.anchors.items():
        anchor.model.register_forward_pre_hook(count(name))
    names = frozen.names(walks, matching=True) | frozen.names(walks, matching=False)
    found = frozen.compute(images, names)
    assert found.keys() == names and runs == {"resnet": 2, "vit": 1}
    resnet, vit = model.anchors["resnet"], model.anchors["vit"]
    with torch.no_grad():
        assert torch.equal(found["front-resnet-2"], resnet(images, 0, 2))
        assert torch.equal(found["front-vit-1"], vit(images, 0, 1))
        assert torch.equal(found["goal-vit-3"], vit(images, 0, 3))
        assert torch.equal(found["teacher"], resnet(images))
        logits = resnet.model.classifier[1](found["goal-resnet-final"].flatten(1))
        assert torch.allclose(logits, found["teacher"], atol=1e-5)
    specs = frozen.specs(torch.float16, CLASSES)
    assert {name: tuple(value.shape[1:]) for name, value in found.items()} == {n: s for n, (s, _) in specs.items()}


def test_options_that_do_not_fit():
    for options, message in (
        ({"sampler": "magic"}, "sampler='magic' is not one of"),
        ({"tuning": "full", "cache_dir": "x"}, "changes the front at every step"),
        ({"tuning": "norm", "torch_compile": True}, "torch_compile needs ends in which nothing trains"),
        ({"num_train_epochs": 0}, "there is nothing to do"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainArgs(**options)


def test_images_in_their_own_order():
    rows = data()
    for source in (rows, DataLoader(rows, batch_size=5, shuffle=True)):
        found = torch.cat([batch["pixel_values"] for batch in first_images(source, 10, 4)])
        assert torch.equal(found, rows.tensors[0][:10])
