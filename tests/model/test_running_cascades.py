"""A model runs cascades: each image as its route alone would, nothing twice; calibrated, saved, within budgets."""

import re
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from several_processes import run_in_processes
from transformers import Trainer, TrainingArguments, pipeline

from restnet_hf import (
    BudgetError,
    Profile,
    Route,
    StitchedModelForImageClassification,
    TrainArgs,
    load_images,
    train,
)
from restnet_hf.anchors.anchor import Anchor
from restnet_hf.demo.paths import DATA, FRONT
from restnet_hf.routes.cascade import Cascade


SMALL, MIDDLE, LARGE = "vit_fashion[:]", "resnet_fashion[:5] + vit_fashion[4:]", "resnet_fashion[:]"
LATER = "resnet_fashion[:7] + vit_fashion[6:]"


@pytest.fixture
def stitched(demo_model, clothes):
    demo_model.add_stitches([MIDDLE, LATER])
    demo_model.fit_stitches(clothes(demo_model, "train", 200))
    return demo_model


@pytest.fixture
def batch(stitched, clothes):
    data = clothes(stitched, "test", 64)
    return torch.stack([torch.as_tensor(data[index]["pixel_values"]) for index in range(64)])


def threshold(model, batch, route, share):
    """The confidence of the highest probability that a share of the images has at least."""
    with torch.no_grad():
        return model(batch, route=route).logits.softmax(-1).max(-1).values.quantile(1 - share).item()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("routes", [(SMALL, LARGE), (SMALL, MIDDLE, LATER), (MIDDLE, LATER, LARGE), (SMALL, LATER)])
@torch.no_grad()
def test_each_image_as_its_route_alone(stitched, batch, routes, size, share):
    """None sure, some, all; the logits are those of the route that answered, in the order of the images."""
    levels = [min(1.0, threshold(stitched, batch, route, share) + 1e-6 * (1 - 2 * share)) for route in routes[:-1]]
    levels = levels if share else [1.0] * len(levels)
    cascade = Cascade(tuple(map(Route.parse, routes)), tuple(levels))
    output = stitched(batch[:size], cascade=cascade)
    alone = torch.stack([stitched(batch[:size], route=route).logits for route in routes])
    sure = alone.softmax(-1).max(-1).values[:-1] >= torch.tensor(levels)[:, None]
    first = torch.where(sure.any(0), sure.int().argmax(0), len(levels))
    assert torch.equal(output.answered_by, first)
    if size > 1:
        assert set(first.tolist()) >= ({0, 1} if 0 < share < 1 else {len(levels)} if not share else {0})
    torch.testing.assert_close(output.logits, alone[first, torch.arange(size)], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_common_beginning_runs_once(stitched, batch, monkeypatch):
    """The front of a later route goes on from where the earlier one left it, for the images that are left."""
    ran = []
    forward = Anchor.forward

    def counted(anchor, x, start=0, stop=None, *rest):
        ran.append((anchor.name, start, stop, len(x)))
        return forward(anchor, x, start, stop, *rest)

    monkeypatch.setattr(Anchor, "forward", counted)
    level = threshold(stitched, batch, MIDDLE, 0.5)
    ran.clear()
    output = stitched(batch, cascade=f"{MIDDLE} >{level} {LATER} >1.0 {LARGE}")
    left = int((output.answered_by > 0).sum())
    assert 0 < left < 64
    assert ran == [
        ("resnet_fashion", 0, 5, 64), ("vit_fashion", 4, None, 64),
        ("resnet_fashion", 5, 7, left), ("vit_fashion", 6, None, left),
        ("resnet_fashion", 7, None, left),
    ]  # fmt: skip


def test_active_until_a_route_is_set(stitched, batch):
    cascade = stitched.set_cascade(f"{SMALL} >0.9 {LARGE}")
    assert stitched.active_cascade == cascade
    assert "answered_by" in stitched(batch)
    with stitched.using(SMALL):
        assert "answered_by" not in stitched(batch)
    assert "answered_by" not in stitched(batch, route=SMALL)
    stitched.set_route(SMALL)
    assert stitched.active_cascade is None
    assert "answered_by" not in stitched(batch)
    with stitched.using(cascade) as used:
        assert used == cascade
        assert "answered_by" in stitched(batch)


def test_threads_run_their_own(stitched, batch):
    """Two cascades and a route in three threads at once give what each gives alone."""
    chosen = [{"cascade": f"{SMALL} >0.9 {LARGE}"}, {"cascade": f"{SMALL} >0.5 {LATER}"}, {"route": MIDDLE}]
    with torch.no_grad():
        expected = [stitched(batch, **each).logits for each in chosen]
    results = [[], [], []]

    def work(number):
        with torch.no_grad():
            results[number] += [stitched(batch, **chosen[number]).logits for _ in range(4)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, want) for want, found in zip(expected, results, strict=True) for each in found)
    assert [len(found) for found in results] == [4, 4, 4]


def test_trainer_and_pipeline(stitched, clothes, tmp_path):
    """Predictions of Trainer are logits alone; the pipeline names what the cascade answers."""
    data = clothes(stitched, "test", 40)
    cascade = stitched.set_cascade(f"{SMALL} >0.9 {LARGE}")
    args = TrainingArguments(str(tmp_path), report_to="none", per_device_eval_batch_size=16, use_cpu=True)
    predictions = Trainer(stitched, args, eval_dataset=data).predict(data).predictions
    images = torch.stack([torch.as_tensor(row["pixel_values"]) for row in data])
    with torch.no_grad():
        logits = stitched(images, cascade=cascade).logits
    np.testing.assert_allclose(predictions, logits.numpy(), rtol=1e-4, atol=1e-4)
    classify = pipeline("image-classification", stitched, image_processor=stitched.image_processor)
    pictures = load_images(DATA, "test")[:3]["image"]
    named = stitched.predict(pictures, cascade=cascade)
    assert [each[0]["label"] for each in classify(pictures)] == [each[0]["label"] for each in named]


def test_one_route_is_trained_or_baked(stitched, batch):
    """Where a cascade is active and one route is needed, an error asks for it."""
    stitched.set_cascade(f"{MIDDLE} >0.5 {LATER}")
    with pytest.raises(ValueError, match="one route is needed"):
        stitched.bake()
    stitched.train()
    with pytest.raises(ValueError, match="to train or for activations give a route"):
        stitched(batch, labels=torch.zeros(64, dtype=torch.long))
    assert stitched.eval()(batch, labels=torch.zeros(64, dtype=torch.long)).loss > 0
    assert stitched.bake(LATER)(batch).shape == (64, 10)


@pytest.fixture
def profiled(stitched, clothes):
    stitched.profile(clothes(stitched, "test", 300), cascades=True)
    return stitched


def test_profile_with_cascades(profiled, tmp_path):
    profile = profiled.profiled
    assert profile.cascades
    alone = {row.route: row for row in profile}
    for row in profile.cascades:
        first, *_, last = row.route.routes
        costs = [alone[route].costs["macs"] for route in row.route.routes]
        assert costs == sorted(costs)
        assert alone[first].costs["macs"] <= row.costs["mean_macs"] <= row.costs["macs"] <= sum(costs)
        assert row.shares[0] == 1
        assert 0 < row.standard_error < 0.04
        assert row.costs["params"] <= sum(alone[route].costs["params"] for route in row.route.routes)
        assert row.costs["memory_mb"] > alone[last].costs["memory_mb"]
        assert profile[str(row.route)] is row
        assert row.route in profile
    assert all(row.costs["mean_macs"] == row.costs["macs"] for row in profile)
    assert {str(row.route) for row in profile.front()} & {str(row.route) for row in profile.cascades}
    assert profile.gap_closed() > profile.gap_closed(stitched_only=True)
    assert profile.gap_closed("macs") == Profile(profile.routes).gap_closed()  # cascades are about means
    assert "gap closed over mean MACs" in str(profile)
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


def test_a_common_beginning_counts_once(stitched, clothes):
    """The most that an image can take is the sum of what runs, where the later route goes on from the earlier."""
    stitched.profile(clothes(stitched, "test", 120), [MIDDLE, LATER], cascades=True)
    costs = {str(row.route): row.costs["macs"] for row in stitched.profiled}
    beginning = stitched.route_costs()(Route.parse("resnet_fashion[:5] + vit_fashion[4:]"))["macs"]
    assert beginning == costs[MIDDLE]
    for row in stitched.profiled.cascades:
        assert max(costs.values()) < row.costs["macs"] < sum(costs.values())


def test_budgets_over_means(profiled):
    profile = profiled.profiled
    row = profile.cascades[0]
    best = profiled.set_budget(mean_macs=row.costs["mean_macs"])
    assert profile[best].scores["accuracy"] >= row.scores["accuracy"]
    assert profiled.active_cascade == best
    most = min(each.costs["macs"] for each in profile) * 1.01
    assert isinstance(profiled.set_budget(mean_macs=row.costs["mean_macs"], macs=most), Route)  # no image takes more
    assert profiled.active_cascade is None
    assert isinstance(profiled.set_budget(macs=1e9), Route)  # a hard limit alone is for routes
    with pytest.raises(BudgetError, match="no route fits mean_macs<=1"):
        profiled.set_budget(mean_macs=1)
    profiled.profile()  # without cascades the mean of a route is its cost
    assert profiled.set_budget(mean_macs=6e6) == Route.parse(SMALL)


def test_saved_and_loaded(profiled, batch, tmp_path):
    cascade = profiled.set_cascade(profiled.profiled.cascades[-1].route)
    profiled.save_pretrained(tmp_path)
    loaded = StitchedModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.active_cascade == cascade
    assert loaded.profiled == profiled.profiled
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, profiled(batch).logits)
    first = profiled.profiled.cascades[0]
    limited = StitchedModelForImageClassification.from_pretrained(
        tmp_path, budget={"mean_macs": first.costs["mean_macs"]}
    )
    assert limited.active_cascade == first.route
    alone = StitchedModelForImageClassification.from_pretrained(tmp_path, route=SMALL)
    assert alone.active_cascade is None
    assert StitchedModelForImageClassification.from_pretrained(tmp_path, route=str(cascade)).active_cascade == cascade


def test_other_weights_end_a_cascade(profiled, clothes, recwarn):
    """Thresholds are of the weights they were calibrated with; a training that fails leaves all as it was."""
    cascade = profiled.set_cascade(profiled.profiled.cascades[0].route)
    data = clothes(profiled, "train", 200)
    with pytest.raises(ValueError, match="loss"):
        train(profiled, data, TrainArgs(learning_rate=1e30, num_train_epochs=3, keep="last"))
    assert profiled.active_cascade == cascade
    assert profiled.profiled is not None
    train(profiled, data, TrainArgs(max_steps=1))
    assert profiled.active_cascade is None
    assert profiled.profiled is None


def test_deleting_a_route(profiled):
    rows = {row.route for row in profiled.profiled.cascades}
    cascade = profiled.set_cascade(f"{SMALL} >0.5 {LATER}")
    with pytest.raises(ValueError, match=re.escape(f"'{cascade}' is the active cascade")):
        profiled.delete_stitch(LATER)
    profiled.set_route(SMALL)
    profiled.delete_stitch(LATER)
    left = {row.route for row in profiled.profiled.cascades}
    assert left == {each for each in rows if Route.parse(LATER) not in each.routes}


def test_dropping_keeps_what_a_cascade_runs(profiled):
    """Beaten routes of the active cascade stay, and it goes on."""
    cascade = profiled.set_cascade(f"{MIDDLE} >0.5 {LATER}")
    profiled.profiled = replace(profiled.profiled, cascades=())
    profiled.drop_dominated()
    assert profiled.active_cascade == cascade
    assert {*cascade.routes} <= {*profiled.routes}


def test_paged_weights(profiled, batch, tmp_path):
    """The weights of all routes of the active cascade are in memory."""
    cascade = profiled.set_cascade(f"{SMALL} >0.9 {LATER}")
    with torch.no_grad():
        before = profiled(batch).logits
        profiled.page_to(tmp_path)
        assert torch.equal(profiled(batch).logits, before)
        profiled.set_route(SMALL)
        profiled.set_cascade(cascade)
        assert torch.equal(profiled(batch).logits, before)


def test_replaced_parts_are_seen(stitched, batch):
    """What is kept for a cascade is not of stitches that are no longer there."""
    cascade = f"{SMALL} >1.0 {LATER}"
    with torch.no_grad():
        before = stitched(batch, cascade=cascade).logits
        stitched.set_route(SMALL)
        stitched.delete_stitch(LATER)
        with pytest.raises(ValueError, match="has no stitch yet"):
            stitched(batch, cascade=cascade)
        stitched.add_stitch(LATER)
        after = stitched(batch, cascade=cascade).logits
        assert torch.equal(after, stitched(batch, route=LATER).logits)
        assert not torch.equal(after, before)


def test_several_adapters(profiled, clothes, tmp_path):
    """Each adapter has cascades of its own, which anchors alone may begin."""
    profiled.save_pretrained(tmp_path)
    profiled.load_stitch(tmp_path, "night")
    both = [f"{adapter}{route}" for adapter in ("", "night: ") for route in (MIDDLE, LATER)]
    rows = profiled.profile(clothes(profiled, "test", 200), both, cascades=True).cascades
    found = {adapter: [row for row in rows if row.route.adapter == adapter] for adapter in ("", "night")}
    assert len(rows) == 2 * len(found[""]) > 0  # the same stitches, so the same cascades
    assert [row.route.thresholds for row in found["night"]] == [row.route.thresholds for row in found[""]]
    assert [row.scores for row in found["night"]] == [row.scores for row in found[""]]
    night = f"{SMALL} >0.9 night: {LATER}"
    assert profiled.set_cascade(night).adapter == "night"


@pytest.mark.slow
def test_agreement_without_labels(stitched, clothes, tmp_path):
    """The cascade agrees with the reference on images that did not choose it, and costs less."""
    images = load_images(DATA, "train").select(range(900)).remove_columns("label")
    cascade = stitched.set_cascade(images=images, agreement=0.9)
    assert stitched.active_cascade == cascade
    rest = clothes(stitched, "test", 300)
    pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rest])
    with torch.no_grad():
        answers, reference = stitched(pixels), stitched(pixels, route=LARGE).logits
    assert (answers.logits.argmax(-1) == reference.argmax(-1)).float().mean() > 0.87
    assert (answers.answered_by == 0).float().mean() > 0.3
    promise = stitched.config.training[-1]
    assert (promise["stage"], promise["cascade"], promise["reference"]) == ("promise", str(cascade), LARGE)
    assert (promise["images"], promise["agreement"], promise["certainty"]) == (900, 0.9, 0.95)
    stitched.save_pretrained(tmp_path)
    again = StitchedModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.training[-1] == promise and again.active_cascade == cascade
    fixed = stitched.set_cascade(f"{SMALL} > {LATER}", images=images, agreement=0.93, confidence="margin")
    assert (fixed.routes, fixed.confidence) == (tuple(map(Route.parse, (SMALL, LATER))), "margin")


def test_predict(profiled, clothes):
    data = clothes(profiled, "test", 8)
    cascade = f"{SMALL} >0.9 {LARGE}"
    with torch.no_grad():
        logits = profiled(torch.stack([torch.as_tensor(row["pixel_values"]) for row in data]), cascade=cascade).logits
    named = [each[0]["label"] for each in profiled.predict(data, cascade=cascade)]
    assert named == [profiled.config.id2label[index] for index in logits.argmax(-1).tolist()]
    assert len(profiled.predict(data, budget={"mean_macs": 1e9})) == 8
    with pytest.raises(ValueError, match="one of route, cascade and budget"):
        profiled.predict(data, cascade=cascade, route=SMALL)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.set_cascade(f"{SMALL} > {LARGE}"), "has no thresholds; profile"),
        (lambda m: m.set_cascade(SMALL), "from 2 to 16 routes, not 1"),
        (lambda m: m.set_cascade(f"{SMALL} >0.5 resnet_fashion[:3] + vit_fashion[4:]"), "has no stitch yet"),
        (lambda m: m.set_cascade(f"{SMALL} >0.5 mobile[:]"), "no anchor named 'mobile'"),
        (lambda m: m.set_cascade(), "give a cascade with thresholds, or images and agreement"),
        (lambda m: m.set_cascade(agreement=0.99), "is measured on images"),
        (lambda m: m.set_cascade(images=torch.zeros(120, 3, 56, 56), agreement=0.99), "give at least 598"),
        (lambda m: m.profile(cascades=True), "calibrated on images"),
        (lambda m: m(torch.zeros(1, 3, 56, 56), route=SMALL, cascade=f"{SMALL} >0.5 {LARGE}"), "not both"),
        (
            lambda m: m(torch.zeros(1, 3, 56, 56), cascade=f"{SMALL} >0.5 {LARGE}", output_hidden_states=True),
            "activations give a route",
        ),
    ],
)
def test_errors(stitched, call, message):
    with pytest.raises(ValueError, match=message):
        call(stitched)


def test_images_in_a_folder(stitched, tmp_path):
    """They are counted, whatever they come in."""
    load_images(DATA, "test")[0]["image"].save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="1 images cannot show agreement=0.9 "):
        stitched.set_cascade(images=str(tmp_path), agreement=0.9)


def test_too_few_images(stitched, clothes):
    with pytest.raises(ValueError, match="40 images are too few"):
        stitched.profile(clothes(stitched, "test", 40), cascades=True)


def test_several_labels_have_no_cascades(stitched):
    stitched.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="multi_label_classification has several"):
        stitched.set_cascade(f"{SMALL} >0.5 {LARGE}")


def test_one_route_has_no_cascades():
    model = StitchedModelForImageClassification.from_anchors(FRONT)
    with pytest.raises(ValueError, match="at least two routes"):
        model.set_cascade(images=torch.zeros(120, 3, *model.preprocessing.image_size), agreement=0.9)


PROCESSES = """
import json, sys
from accelerate import PartialState
from restnet_hf import StitchedModelForImageClassification, load_images
from restnet_hf.demo.paths import DATA

model = StitchedModelForImageClassification.from_pretrained(sys.argv[1])
rows = load_images(DATA, "test").select(range(310))  # of 64, the last batch is not a whole one
profile = model.profile(rows, cascades=True)
cascades = [[str(row.route), dict(row.costs), dict(row.scores), row.shares] for row in profile.cascades]
scores = [row.scores for size in (64, 200) for row in model.profile(rows, batch_size=size)]
streamed = model.profile(model.prepare_data(rows.to_iterable_dataset()))
promised = [
    str(model.set_cascade(images=rows.remove_columns("label"), agreement=0.9, batch_size=size)) for size in (64, 200)
]
if PartialState().is_main_process:
    every = [cascades, scores, [row.scores for row in streamed], streamed.metadata["images"], promised]
    print(json.dumps([PartialState().num_processes, every]))
"""


@pytest.mark.slow
def test_processes_give_what_one_gives(stitched, tmp_path):
    """Exactly the scores, thresholds and shares of one process; two batches are fewer than three processes."""
    stitched.save_pretrained(tmp_path / "adapter")
    results = run_in_processes(PROCESSES, tmp_path, arguments=["adapter"])
    assert [processes for processes, _ in results] == [1, 2, 3]
    assert results[0][1] == results[1][1] == results[2][1]
    cascades, scores, streamed, images, _ = results[0][1]
    assert cascades and images == 310 and scores == streamed * 2
