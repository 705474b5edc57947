"""What trains by each kind of tuning, from what, and with which losses."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import CLASSES, make_anchor
from torch.utils.data import DataLoader
from trainings import FAST, ROUTES, build, data, trained
from waiting import waits

from restnet_hf import StitchedModelForImageClassification, TrainArgs, train
from restnet_hf.data.datasets import IGNORED
from restnet_hf.routes.route import TunedKey
from restnet_hf.steps import first_segment
from restnet_hf.stitches.layers import STITCHES, StitchConfig
from restnet_hf.stitches.tuning import HEAD, tuned_keys
from restnet_hf.training.frozen import FrozenPart
from restnet_hf.training.learner import KINDS, Learner
from restnet_hf.training.loaders import first_images
from restnet_hf.training.loop import Training, start_accelerator
from restnet_hf.training.losses import goal_scales, matching_loss, task_loss
from restnet_hf.training.samplers import SAMPLERS
from restnet_hf.training.teachers import Teacher
from restnet_hf.training.validation import Split


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
    kinds = {TunedKey.parse(key).kind for key in model.tuned}
    wanted = set(KINDS[tuning]) - {HEAD} - ({"bias"} if tuning == "lora" and not model.tuned else set())
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


def test_learning_rates_of_tuned_weights():
    """A tenth for full tuning, as for stitches otherwise, and what was asked for."""
    for options, expected in (
        ({"tuning": "full"}, {1e-2: "stitches", 1e-3: "tuned"}),
        ({"tuning": "lora", "anchor_learning_rate": 3e-3}, {1e-2: "stitches", 3e-3: "tuned"}),
    ):
        model, args = build(), TrainArgs(learning_rate=1e-2, warmup_ratio=0, **options)
        job = Training(model, Split(data()), args, model.routes, start_accelerator(model, args))
        names = iter(job.learner.parameters)
        groups = {group["initial_lr"]: {next(names).split(".")[0] for _ in group["params"]}
                  for group in job.optimizer.param_groups}  # fmt: skip
        assert groups == {rate: {what} for rate, what in expected.items()}


def test_automatic_learning_rates():
    """Each weight has its own, also after least squares gave the weights other sizes."""
    model = build()
    with torch.no_grad():
        for stitch in model.stitches.values():
            for parameter in stitch.parameters():
                parameter.copy_(torch.where(torch.rand(parameter.shape) < 0.5, 0.1, -0.1))
    args = TrainArgs(least_squares_images=24, num_train_epochs=1, batch_size=8, warmup_ratio=0)
    job = Training(model, Split(data()), args, model.routes, start_accelerator(model, args))
    names = {parameter: name for name, parameter in job.learner.parameters.items()}
    rates = {names[group["params"][0]]: group["initial_lr"] for group in job.optimizer.param_groups}
    assert rates.keys() == job.learner.parameters.keys()
    for name, rate in rates.items():
        parameter = job.learner.parameters[name]
        wanted = 0.03 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1e-3
        assert rate == pytest.approx(wanted)
    job._start()  # least squares gives the weights other sizes
    for group in job.optimizer.param_groups:
        (parameter,) = group["params"]
        size = parameter.detach().square().mean().sqrt().item()
        wanted = 0.3 * size / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1e-3
        assert group["initial_lr"] == pytest.approx(wanted)
        assert group["lr"] == pytest.approx(wanted)


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
    args = TrainArgs(least_squares_images=24, num_train_epochs=1, learning_rate=1e-9, teacher="resnet")
    first = train(model, data(), args).losses
    args = TrainArgs(num_train_epochs=15, batch_size=8, learning_rate=1e-2, teacher="resnet", keep="last")
    last = train(model, data(), args).losses
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
    features = {name: goal + torch.randn(goal.shape, generator=generator) for name, goal in goals.items()}
    scales = goal_scales(goals)
    terms = []
    for name, goal in goals.items():
        rows = goal.double().flatten(1)
        variance = (rows - rows.mean(0)).square().sum(0) / 7
        assert scales[name] == pytest.approx(variance.mean().item(), rel=1e-6)
        terms.append((features[name] - goal).double().square().mean() / variance.mean())
    assert matching_loss(features, goals, scales).item() == pytest.approx(sum(terms).item() / 2, rel=1e-5)
    assert goal_scales({"same": torch.ones(4, 2)}) == {"same": 1.0}


@pytest.mark.parametrize("match", ["final", "later"])
def test_matching_by_hand(match):
    """A route's features after the end against the end anchor's own, at the head's input and at the later cuts."""
    model = build()
    x, labels = data()[:8]
    args = TrainArgs(matching_epochs=1, match=match, num_train_epochs=0)
    job = Learner(model, ROUTES, args, lambda: iter([x]))
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
            (value.double() - own.double()).square().mean() / own.double().flatten(1).var(0).mean()
            for value, own in [*pairs, tuple(finals)]
        ]
        assert found[name] == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-4)


TWICE = ["resnet[:2] + vit[1:2] + resnet[4:]", "resnet[:1] + resnet[3:3] + resnet[5:]"]


def elastic(name="resnet"):
    """One anchor that skips blocks by branches, with weights that are not its own any more."""
    model = StitchedModelForImageClassification.from_anchors(make_anchor(name), routes="skip")
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.stitches.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return model


def matching(model, routes, batch):
    """The matching losses of routes on a batch, scaled by itself."""
    args = TrainArgs(matching_epochs=1, match="stitch", num_train_epochs=0)
    job = Learner(model, routes, args, lambda: iter([batch]))
    with torch.no_grad():
        losses = job.losses({"pixel_values": batch}, job.routes, True, False, nullcontext)
        return {str(route): loss.item() for route, loss in zip(job.routes, losses, strict=True)}


@pytest.mark.parametrize("route", TWICE)
def test_matching_what_each_stitch_replaces_by_hand(route):
    """In float64: each stitch on the route's own path against the anchor's own activation, over its variance."""
    model = build()
    route = model.add_stitch(route)
    x = data()[:8][0]
    found = matching(model, [route], x)[str(route)]
    model.double()
    anchors, terms, y = model.anchors, [], x.double()
    first, *others = route.segments
    with torch.no_grad():
        y = anchors[first.anchor](y, 0, first.stop)
        for point, segment in zip(route.stitch_points, others, strict=True):
            y = model.stitches[point.name](y)
            own = anchors[segment.anchor](x.double(), 0, segment.start)
            variance = own.flatten(1).var(0).mean()
            terms.append(((y - own).square().mean() / variance).item())
            if segment.stop not in (None, segment.start):
                y = anchors[segment.anchor](y, segment.start, segment.stop)
    assert len(terms) == 2 and found == pytest.approx(sum(terms) / 2, rel=1e-4)


def test_a_perfect_stitch_matches():
    """Branches that are the identity's own block: of a route that skips nothing the loss is that of rounding."""
    model = StitchedModelForImageClassification.from_anchors(make_anchor("resnet"), routes="skip")
    route = model.add_stitch("resnet[:2] + resnet[3:3] + resnet[4:]", StitchConfig("branch"))
    x = data()[:8][0]
    assert matching(model, [route], x)[str(route)] < 1e-9
    with torch.no_grad():
        model.set_route(route)
        assert torch.allclose(model(x).logits, model.anchors["resnet"](x), atol=1e-5)


def test_later_stitches_see_what_earlier_ones_give():
    """The student's own path: the second branch's loss depends on the first's weights, and trains both."""
    model = elastic()
    route = "resnet[:1] + resnet[3:4] + resnet[6:]"
    x = data()[:8][0]
    first, second = (model.stitches[point.name] for point in model.route(route).stitch_points)
    args = TrainArgs(matching_epochs=1, match="stitch", num_train_epochs=0)
    job = Learner(model, [route], args, lambda: iter([x]))
    (loss,) = job.losses({"pixel_values": x}, job.routes, True, False, nullcontext)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for branch in (first, second) for p in branch.parameters())
    alone = model.route("resnet[:4] + resnet[6:]")
    before = matching(model, [alone], x)[str(alone)]
    clean = 2 * loss.item() - matching(model, ["resnet[:1] + resnet[3:]"], x)["resnet[:1] + resnet[3:]"]
    assert clean != pytest.approx(before, rel=1e-3), "errors of the first are carried on"


@pytest.mark.parametrize(
    "sampler", ["all", *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS if name != "all")]
)
def test_two_stages_of_one_anchor(sampler, tmp_path):
    """Each branch first matches what it replaces, then the task is learned: both losses fall, from disk as well."""
    x = data()[:24][0]
    routes = [
        "resnet[:1] + resnet[3:]",
        "resnet[:1] + resnet[3:4] + resnet[6:]",
        "resnet[:3] + resnet[5:5] + resnet[6:]",
    ]
    options = {"match": "stitch", "sampler": sampler, "batch_size": 8, "learning_rate": 1e-2, "keep": "last"}
    model = elastic()
    model.add_stitch(routes[2], StitchConfig("branch"))
    frozen = {key: value.clone() for key, value in model.anchors.state_dict().items()}
    before = matching(model, routes, x)
    train(model, data(), TrainArgs(matching_epochs=8, num_train_epochs=0, **options), routes=routes)
    after = matching(model, routes, x)
    assert all(after[route] < 0.7 * before[route] for route in routes)
    first = train(model, data(), TrainArgs(num_train_epochs=1, **{**options, "learning_rate": 1e-9}), routes=routes)
    twins = copy.deepcopy(model), copy.deepcopy(model)
    both = {"matching_epochs": 1, "num_train_epochs": 6, **options}
    results = [
        train(twin, data(), TrainArgs(cache_dir=folder, **both), routes=routes)
        for twin, folder in zip(twins, (None, str(tmp_path)), strict=True)
    ]
    for result in results:
        seen = [route for route in routes if route in result.losses and route in first.losses]
        assert seen and sum(result.losses[r] for r in seen) < 0.9 * sum(first.losses[r] for r in seen)
    assert any(tmp_path.iterdir())
    assert results[0].losses == pytest.approx(results[1].losses, rel=0.05), "but for rounding on disk"
    assert all(torch.equal(value, frozen[key]) for key, value in model.anchors.state_dict().items())


def test_only_goals_of_the_routes_that_are_drawn(images):
    """What a step computes of the frozen anchor is what its routes need."""
    model = elastic()
    args = TrainArgs(matching_epochs=1, match="stitch", num_train_epochs=0)
    job = Learner(model, ["resnet[:1] + resnet[3:]", "resnet[:4] + resnet[6:]"], args)
    one, two = job.routes
    assert job.frozen.names([one], matching=True) == {"front-resnet-1", "goal-resnet-3"}
    assert job.frozen.names([two], matching=True) == {"front-resnet-4", "goal-resnet-6"}
    with torch.no_grad():
        found = job.frozen.compute(images, job.frozen.names([one, two], matching=True))
        assert torch.equal(found["goal-resnet-6"], model.anchors["resnet"](images, 0, 6))


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
    forth, other, back = walks
    goals = {forth: {"vit": {None, 3}}, back: {"resnet": {None, 5}}}
    frozen = FrozenPart(walks, before, Teacher("resnet", "", {"resnet": alone["resnet"]}), goals)
    assert frozen.names([forth], matching=True) == {"front-resnet-2", "goal-vit-3", "goal-vit-final"}
    assert frozen.names([other], matching=True) == {"front-resnet-4"}, "it has nothing to match"
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
        assert torch.equal(found["teacher-resnet"], resnet(images))
        logits = resnet.model.classifier[1](found["goal-resnet-final"].flatten(1))
        assert torch.allclose(logits, found["teacher-resnet"], atol=1e-5)
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


def test_routes_without_norms_train_their_stitches(caplog):
    """The others train their norms too; where no route has any, that is an error."""
    model = StitchedModelForImageClassification.from_anchors(
        make_anchor("vit"), make_anchor("resnet", seed=1), order="given"
    )
    last = model.anchors["resnet"].depth
    routes = [model.add_stitch(f"vit[:1] + resnet[{cut}:]") for cut in (1, last)]
    with caplog.at_level("WARNING"):
        train(model, data(), TrainArgs(**FAST, tuning="norm"))
    assert f"['{routes[1]}'] have nothing of kind 'norm' behind their last stitch" in caplog.text
    assert [*model.tuned] == [str(tuned_keys(routes[0])[-1][-1])]
    with pytest.raises(ValueError, match="no route has anything of kind 'norm' behind its last stitch"):
        train(model, data(), TrainArgs(**FAST, tuning="norm"), routes[1])


@pytest.mark.parametrize("missing", [False, True])
def test_a_step_waits_for_no_route(missing):
    """Losses of a step, and the scores of held-out images, are on the device until all is queued."""
    model = build()
    args, rows = TrainArgs(num_train_epochs=1, distillation=0.0), data(6)
    learner = Learner(model, ROUTES, args)
    batch = {"pixel_values": rows.tensors[0], "labels": rows.tensors[1].clone()}
    if missing:
        batch["labels"][0] = IGNORED

    def step():
        for loss in learner.losses(batch, learner.routes, False, False, nullcontext):
            loss.backward()

    @torch.no_grad()
    def scores():
        return [right for _, right, _ in learner.evaluate(batch, learner.routes, False, nullcontext)]

    assert waits(step) == 0
    labels_alone = len(ROUTES)  # whether any is missing, which is read where the labels are: on the processor
    assert waits(scores) == labels_alone + 2 * missing * len(ROUTES)
    assert all(len(right) == 6 - missing for right in scores())


def test_autocast_around_everything(images):
    """What is fitted and trained inside one ``torch.autocast`` runs there with its new weights, not those cached."""
    model, rows = build(), data()
    args = {"batch_size": len(rows), "learning_rate": 0.05, "warmup_ratio": 0.0, "distillation": 0.0, "keep": "last"}
    with torch.autocast("cpu", torch.bfloat16):
        before = model(images, route=ROUTES[0]).logits
        model.fit_stitches(rows.tensors[0])
        fitted = model(images, route=ROUTES[0]).logits
        first, last = (
            train(copy.deepcopy(model), rows, TrainArgs(num_train_epochs=epochs, **args)).losses for epochs in (1, 4)
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images, route=ROUTES[0]).logits, fitted) and not torch.equal(before, fitted)
    assert all(last[route] < first[route] - 0.01 for route in ROUTES)
