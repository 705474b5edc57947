"""No route ends worse on held-out images than it began, in whatever form the images come."""

import copy
import json
import math

import pytest
import torch
from conftest import CLASSES
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler
from trainings import ROUTES, Noisy, build, data, trained
from versions import needs_tensor_format

from restnet_hf import Route, StitchedModelForImageClassification, TrainArgs, train
from restnet_hf.data import with_pixel_values
from restnet_hf.data.datasets import load_images
from restnet_hf.demo.paths import DATA, END, FRONT
from restnet_hf.training.args import RouteScores
from restnet_hf.training.validation import BestStates, Score, _score, held_out_indices, select_rows, split_held_out


HARMFUL = {"num_train_epochs": 2, "batch_size": 8, "learning_rate": 1.0, "distillation": 0.0}
PAIRS = "pixel_values", "labels"


def accuracy(model, route, images, labels):
    with torch.no_grad():
        right = model(images, route=route).logits.argmax(-1) == labels
    return right.float().mean().item()


def test_which_images_are_held_out():
    """A tenth, at least 100, at most half; each class has its share."""
    labels = [0] * 700 + [1] * 200 + [2] * 100
    held = held_out_indices(1000, labels, seed=0)
    assert held == sorted(set(held)) and [sum(labels[i] == c for i in held) for c in range(3)] == [70, 20, 10]
    assert held == held_out_indices(1000, labels, seed=0) != held_out_indices(1000, labels, seed=1)
    sizes = [len(held_out_indices(count, None, 0)) for count in (1, 2, 60, 250, 5000)]
    assert sizes == [0, 1, 30, 100, 500]


def plain(images):
    return Dataset.from_dict({"pixel_values": images.tolist(), "labels": [0] * len(images)}).with_format("torch")


TABLE = pytest.param("dataset", marks=needs_tensor_format)


@pytest.mark.parametrize("kind", ["tensors", "loader", "custom loader", TABLE, "own", "stream", "short stream"])
def test_every_form_of_images_is_split(kind):
    rows = data(40 if kind != "short stream" else 8)
    images = rows.tensors[0]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    source, args = rows, TrainArgs(batch_size=4, max_steps=2)
    if kind == "loader":
        source = DataLoader(rows, batch_size=4, shuffle=True)
    elif kind == "custom loader":
        source = DataLoader(rows, batch_size=4, sampler=WeightedRandomSampler([1.0] * 40, 40))
    elif kind == "dataset":
        source = plain(images)
    elif kind == "own":
        source = Noisy(rows)
    elif "stream" in kind:
        source = Stream()
    split = split_held_out(source, args)
    if kind == "custom loader":
        assert split.train is source and split.held_out is None
        return

    def first_pixels(part):
        found = set()
        for item in part:
            batch = item if isinstance(item, dict) else dict(zip(PAIRS, item, strict=True))
            values = batch["pixel_values"]
            found |= {round(float(each.flatten()[0]), 5) for each in (values if values.dim() == 4 else [values])}
        return found

    if kind == "own":  # random images: only the indices can be compared
        assert split.indices is not None and not set(split.indices[0]) & set(split.indices[1])
        return
    train_pixels, held_pixels = first_pixels(split.train), first_pixels(split.held_out)
    whole = {round(float(each.flatten()[0]), 5) for each in images}
    assert not train_pixels & held_pixels and train_pixels | held_pixels == whole
    assert len(held_pixels) == len(whole) // 2
    if kind == "loader":
        assert isinstance(split.train.sampler, RandomSampler)


def test_held_out_images_are_not_augmented(tmp_path):
    rows = load_images(str(DATA), "test").select(range(8))
    model = StitchedModelForImageClassification.from_anchors(FRONT, END)
    augmented = with_pixel_values(rows, model.image_processor, augment="randaugment")
    same = with_pixel_values(rows, model.image_processor)
    split = split_held_out(augmented, TrainArgs())
    assert split.indices is not None
    assert torch.equal(split.held_out[:]["pixel_values"], same[split.indices[1]]["pixel_values"])


@pytest.mark.parametrize("options", [{}, {"tuning": "norm"}, {"cache_dir": "cache"}, {"sampler": "uniform"}])
def test_a_harmful_training_changes_nothing(options, tmp_path):
    """A learning rate of 1 destroys the stitches: the state before training stays, and the result says so."""
    if "cache_dir" in options:
        options = {"cache_dir": str(tmp_path)}
    model, rows = build(), data(60, CLASSES)
    before = trained(model)
    result = train(model, rows, TrainArgs(**HARMFUL, **options))
    held = split_held_out(rows, TrainArgs()).held_out.tensors
    assert result.held_out_images == 30 and result.scores.keys() == set(ROUTES)
    for route, scores in result.scores.items():
        assert scores.metric == "accuracy" and scores.best >= scores.start and scores.best >= scores.last
        assert accuracy(model, route, *held) == pytest.approx(scores.best, abs=1e-6)
        if scores.step == 0:
            name = f"stitches.{model.route(route).stitch_points[0].name}."
            kept = {key: value for key, value in trained(model).items() if key.startswith(name)}
            assert kept and all(torch.equal(value, before[key]) for key, value in kept.items())
    stage = model.config.training[-1]
    assert stage["scores"][ROUTES[0]]["best"] == result.scores[ROUTES[0]].best and stage["held_out_images"] == 30


def test_last_keeps_what_is_last():
    ours, reference = build(), build()
    result = train(ours, data(), TrainArgs(**HARMFUL, keep="last"))
    assert result.scores == {} and result.held_out_images == 0
    assert any(not torch.equal(value, trained(reference)[name]) for name, value in trained(ours).items())
    with pytest.raises(ValueError, match="with keep='last' and 0 \\+ 3 epochs no route is scored"):
        train(build(), data(), TrainArgs(keep="last"), validation=data(8))


def test_the_best_state_is_that_of_its_step():
    """Ending at the step that the result names, without held-out images, gives the same weights."""
    rows, held = data(64), data(32)
    args = {"num_train_epochs": 3, "batch_size": 16, "learning_rate": 0.05, "warmup_ratio": 0.0, "distillation": 0.0}
    best = build()
    result = train(best, rows, TrainArgs(**args, eval_steps=1, early_stopping_patience=None), validation=held)
    for route, scores in result.scores.items():
        states = build()
        name = f"stitches.{states.route(route).stitch_points[0].name}."
        if scores.step:
            steps = []
            original = torch.optim.AdamW.step

            def step(self, *inputs, original=original, steps=steps, states=states, **options):
                result = original(self, *inputs, **options)
                steps.append(trained(states))
                return result

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.optim.AdamW, "step", step)
                train(states, rows, TrainArgs(**args, keep="last"))
            expected = steps[scores.step - 1]
        else:
            expected = trained(states)
        found = {key: value for key, value in trained(best).items() if key.startswith(name)}
        assert all(torch.allclose(value, expected[key], atol=1e-6) for key, value in found.items())


def test_without_labels_agreement_counts():
    model, images = build(), data(60).tensors[0]
    result = train(model, images, TrainArgs(distillation=1.0, num_train_epochs=1, batch_size=10))
    held = split_held_out(images, TrainArgs()).held_out
    for route, scores in result.scores.items():
        assert scores.metric == "agreement"
        with torch.no_grad():
            teachers = [model(held, route=f"{name}[:]").logits.argmax(-1) for name in model.anchors]
            same = [(model(held, route=route).logits.argmax(-1) == teacher).float().mean() for teacher in teachers]
        assert any(scores.best == pytest.approx(float(each), abs=1e-6) for each in same)


def test_matching_without_labels_is_judged_by_an_anchor():
    """Nothing is distilled, but agreement says more of a route than its loss."""
    args = TrainArgs(matching_epochs=1, num_train_epochs=0, batch_size=10)
    result = train(build(), data(60).tensors[0], args)
    assert {scores.metric for scores in result.scores.values()} == {"agreement"} and result.teacher is not None
    labelled = train(build(), data(60), args)
    assert {scores.metric for scores in labelled.scores.values()} == {"accuracy"} and labelled.teacher is None


def test_a_random_head_is_no_judge():
    """Routes that match features before any head was trained are compared by their loss."""
    model = build(num_labels=CLASSES)
    args = TrainArgs(matching_epochs=2, num_train_epochs=0, batch_size=10, distillation=0.0, train_head=False)
    result = train(model, data(60), args)
    assert {scores.metric for scores in result.scores.values()} == {"loss"}
    assert all(scores.best <= scores.start for scores in result.scores.values())


def test_routes_that_share_weights_keep_one_state():
    model = build()
    result = train(model, data(60), TrainArgs(**HARMFUL, tuning="full"))
    steps = {scores.step for scores in result.scores.values()}
    assert len(steps) == 1
    assert all(s.best >= s.start for s in result.scores.values())


def test_no_route_that_shares_weights_falls():
    """Of the states in which each is as good as at the start, the one with the best mean stays."""
    shared = torch.nn.Linear(1, 1)
    model = build()
    one, other = map(model.route, ROUTES[:2])
    states = BestStates({one: {"shared": shared}, other: {"shared": shared}})
    for step, scores in enumerate([(0.5, 0.5), (0.9, 0.49), (0.6, 0.5), (0.5, 0.5)]):
        torch.nn.init.constant_(shared.weight, step)
        found = {route: Score(score, -1.0) for route, score in zip((one, other), scores, strict=True)}
        states.update(found, step, float(step), [one, other])
    states.restore()
    assert shared.weight.item() == 2.0
    results = states.results({one: "accuracy", other: "accuracy"})
    assert [(each.start, each.best, each.step) for each in results.values()] == [(0.5, 0.6, 2), (0.5, 0.5, 2)]


REAL = [  # ways to train that can do harm
    {},
    {"tuning": "norm"},
    {"tuning": "full", "sampler": "uniform", "learning_rate": 0.01},
    {"learning_rate": 0.1},
    {"matching_epochs": 1, "num_train_epochs": 0, "distillation": 0.0},
]


@pytest.mark.slow  # thirty trainings
@pytest.mark.parametrize("front, end", [(FRONT, END), (END, FRONT)])
@pytest.mark.parametrize("options", REAL)
def test_no_route_falls_on_real_images(front, end, options, clothes):
    """Scores of the held-out images are counted here, before and after each training, with three seeds."""
    model = StitchedModelForImageClassification.from_anchors(front, end, order="given", dtype=torch.float32)
    rows = clothes(model, "train", 300)
    for seed in range(3):
        model.set_route(Route.alone(model.front))
        for route in model.routes:
            model.delete_stitch(route)
        model.select_stitches(rows.select(range(100)), "position", 3)
        model.fit_stitches(rows)
        args = TrainArgs(**{"num_train_epochs": 1, "train_head": False, "seed": seed, **options})
        held = select_rows(rows, held_out_indices(300, rows[:]["labels"].tolist(), seed))[:]
        before = {route: accuracy(model, route, *map(held.get, PAIRS)) for route in model.routes}
        result = train(model, rows, args)
        assert result.held_out_images == 100 == len(held["labels"])
        for route, score in before.items():
            after = accuracy(model, route, *map(held.get, PAIRS))
            assert after == pytest.approx(result.scores[str(route)].best) and after >= score - 1e-6, route


@pytest.mark.parametrize("options", [{}, {"tuning": "norm"}, {"sampler": "importance"}])
def test_resume_is_exact(options, tmp_path):
    """Also the best states, scores and routes that have left are those of an uninterrupted run."""
    args = {"num_train_epochs": 3, "batch_size": 8, "learning_rate": 0.03, "save_steps": 1, "eval_steps": 2, **options}
    args |= {"early_stopping_patience": 3}
    whole, again, images = build(), build(), Noisy(data(60))
    expected = train(whole, images, TrainArgs(**{**args, "save_steps": None}))
    out = str(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(build(), Noisy(data(60), (10**9 - images.left) * 2 // 3), TrainArgs(output_dir=out, **args))
    found = train(again, Noisy(data(60)), TrainArgs(output_dir=out, resume_from_checkpoint=True, **args))
    assert found.scores == expected.scores
    assert all(torch.equal(value, trained(again)[name]) for name, value in trained(whole).items())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any(f"held_out/{ROUTES[0]}" in line for line in lines)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    args = {"num_train_epochs": 2, "batch_size": 8, "output_dir": str(tmp_path), "save_steps": 1, "distillation": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train(build(), Noisy(data(60), 40), TrainArgs(**args, keep="last"))
    with pytest.raises(ValueError, match="belong to a training with keep='last', not 'best'"):
        train(build(), Noisy(data(60)), TrainArgs(**args, resume_from_checkpoint=True))


def test_a_state_that_diverged_is_never_the_best():
    assert _score(5, math.nan, 10) == Score(0.5, -math.inf) < _score(5, 1e9, 10)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": "last", "eval_steps": 3}, "eval_steps scores routes, and keep='last' scores none"),
        ({"max_minutes": 1.0, "num_train_epochs": 0, "least_squares_images": 9}, "max_minutes limits epochs"),
    ],
)
def test_options_that_would_be_ignored(options, message):
    with pytest.raises(ValueError, match=message):
        TrainArgs(**options)


def test_routes_that_gain_no_more_leave():
    """Their losses stay those of their last steps, and the others go on."""
    model = build()
    stuck = copy.deepcopy(model.stitches[model.route(ROUTES[0]).stitch_points[0].name].state_dict())
    args = {"num_train_epochs": 20, "batch_size": 15, "learning_rate": 1e-12, "distillation": 0.0}
    result = train(model, data(60), TrainArgs(**args, early_stopping_patience=2))
    assert result.steps < 40 and set(result.losses) == set(ROUTES)
    assert all(torch.equal(value, stuck[key]) for key, value in
               model.stitches[model.route(ROUTES[0]).stitch_points[0].name].state_dict().items())  # fmt: skip


@pytest.mark.slow  # the time must be long enough for a busy machine
def test_time_is_kept():
    model = build()
    result = train(model, data(200), TrainArgs(num_train_epochs=10_000, batch_size=8, max_minutes=0.25))
    assert 1 <= result.steps < 250_000 and result.seconds < 15.0
    assert all(isinstance(scores, RouteScores) and scores.best >= scores.start for scores in result.scores.values())


def test_rows_of_a_tensor():
    rows = torch.arange(6.0)
    assert select_rows(rows, [4, 1]).tolist() == [4.0, 1.0]
    chosen = select_rows(TensorDataset(rows, rows + 1), [5])
    assert [float(each) for each in chosen[0]] == [5.0, 6.0]
