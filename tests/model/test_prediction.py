"""A model takes whatever a user has, in every method alike, and names what is in pictures."""

import threading

import numpy as np
import pytest
import torch
from conftest import CLASSES, SIZE, make_anchor, make_model
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image
from transformers import AutoImageProcessor, Trainer, TrainingArguments, pipeline
from versions import LEAST_TORCH, older

from restnet_hf import (
    Budget,
    BudgetError,
    PictureError,
    Preprocessing,
    StitchedModelForImageClassification,
    TrainArgs,
    adapt,
    export_routes,
    load_anchor,
    load_images,
    train,
    with_pixel_values,
)
from restnet_hf.demo.paths import DATA, END, FRONT


ROUTE = "resnet_fashion[:5] + vit_fashion[4:]"


@pytest.fixture(scope="module")
def raw():
    return load_images(DATA, "test").select(range(40))


@pytest.fixture(scope="module")
def shuffled(raw):
    """The same pictures, their classes in another order, in columns of other names."""
    names = raw.features["label"].names
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    features = Features({"photo": ImageColumn(), "kind": ClassLabel(names=[names[index] for index in order])})
    labels = [order.index(label) for label in raw["label"]]
    return Dataset.from_dict({"photo": raw["image"][:], "kind": labels}, features=features)


@pytest.fixture
def stitched(demo_model):
    demo_model.set_route(demo_model.add_stitch(ROUTE))
    return demo_model


# Every method takes pictures as they are


def test_classes_in_another_order(stitched, raw, shuffled):
    """The same pictures give the same accuracy, whatever the order of the data set's classes is."""
    scores = [[row.scores["accuracy"] for row in stitched.profile(data).routes] for data in (raw, shuffled)]
    assert scores[0] == scores[1] and max(scores[0]) > 0.8


@pytest.mark.slow
def test_every_method_takes_raw_pictures(demo_model, raw, shuffled, tmp_path):
    """And gives the same whatever the order of the data set's classes is."""
    ready = with_pixel_values(raw, demo_model.image_processor)
    chosen = []
    for data in (ready, raw, shuffled):
        model = StitchedModelForImageClassification.from_anchors(FRONT, END, dtype="float32")
        chosen.append(model.select_stitches(data, "fitted_accuracy", max_routes=2))
        model.fit_stitches(data)
        torch.manual_seed(0)
        train(model, data, TrainArgs(num_train_epochs=1, batch_size=20, seed=0, keep="last"))
        scores = [row.scores["accuracy"] for row in model.profile(data).routes]
        chosen[-1] += [scores, adapt(model, data, Budget(macs=1e9)).best.scores]
    assert chosen[0] == chosen[1] == chosen[2]
    exported = export_routes(model, tmp_path / "out", data=shuffled)
    assert exported.profiled.routes[0].scores["agreement"] == 1


def test_classes_of_another_order_or_task(stitched, shuffled):
    """Accuracies of 6.7 % and 13.3 % came of these, without a word."""
    prepared = with_pixel_values(shuffled, stitched.image_processor)
    others = shuffled.cast_column("kind", ClassLabel(names=[f"kind {index}" for index in range(10)]))
    few = shuffled.cast_column("kind", ClassLabel(names=[f"kind {index}" for index in range(12)]))
    for data, message in ((prepared, "another order"), (others, "names differ"), (few, "has 12 classes")):
        exports = () if older(torch=LEAST_TORCH) else (lambda data: export_routes(stitched, "nowhere", data=data),)
        for method in (
            lambda data: stitched.profile(data),
            lambda data: adapt(stitched, data, Budget(macs=1e9)),
            lambda data: stitched.select_stitches(data, "fitted_accuracy", max_routes=1),
            lambda data: train(stitched, data, TrainArgs()),
            *exports,
        ):
            with pytest.raises(ValueError, match=message):
                method(data)
        stitched.compare(data, ["cka"])
        stitched.fit_stitches(data)


@pytest.mark.slow
def test_broken_pictures_are_skipped_everywhere(stitched, raw, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        raw[index]["image"].save(folder / f"{index}.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:99])
    methods = [
        lambda **options: stitched.compare(folder, ["cka"], **options),
        lambda **options: stitched.select_stitches(folder, max_routes=1, **options),
        lambda **options: stitched.fit_stitches(folder, **options),
        lambda **options: train(stitched, folder, TrainArgs(distillation=1.0), **options),
        lambda **options: adapt(stitched, folder, Budget(macs=1e9), **options),
        lambda **options: export_routes(stitched, tmp_path / "out", data=folder, **options),
        lambda **options: stitched.predict(folder, **options),
        lambda **options: stitched.profile(with_labels, **options),
    ]
    with_labels = [(path, 0) for path in sorted(folder.iterdir())]
    for method in methods:
        with pytest.raises(PictureError, match=r"3\.png cannot be read"):
            method()
        method(on_error="skip")
    assert stitched.profile(with_labels, on_error="skip").metadata["images"] == 11


# Predictions


def test_predict_is_the_pipeline(stitched, raw, tmp_path):
    classify = pipeline("image-classification", model=stitched, image_processor=stitched.image_processor)
    picture = raw[0]["image"]
    picture.save(tmp_path / "a.png")
    expected = classify(picture.convert("RGB"))
    for image in (picture, tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(picture)):
        found = stitched.predict(image)
        assert [row["label"] for row in found] == [row["label"] for row in expected]
        assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], rel=1e-5)
    several = stitched.predict(raw, top_k=1, batch_size=7)
    logits = stitched(with_pixel_values(raw, stitched.image_processor)[:]["pixel_values"]).logits
    names = stitched.config.id2label
    assert [row[0]["label"] for row in several] == [names[index] for index in logits.argmax(-1).tolist()]
    assert len(stitched.predict([picture], top_k=None)[0]) == 10 and len(stitched.predict(tmp_path)) == 1
    assert sum(row["score"] for row in stitched.predict(picture, top_k=99)) == pytest.approx(1)


def test_a_route_or_budget_of_one_call(stitched, raw):
    picture = raw[0]["image"]
    with pytest.raises(BudgetError, match="call profile"):
        stitched.predict(picture, budget={"macs": 1e9})
    profile = stitched.profile(raw)
    cheapest = min(profile.routes, key=lambda row: row.costs["macs"])
    limit = {"macs": cheapest.costs["macs"]}
    scores = [stitched.predict(picture, route=f"{name}[:]")[0]["score"] for name in stitched.anchors]
    assert len({*scores, stitched.predict(picture)[0]["score"]}) == 3
    assert stitched.predict(picture, budget=limit) == stitched.predict(picture, route=cheapest.route)
    assert stitched.predict(picture, budget=Budget(**limit)) == stitched.predict(picture, budget=limit)
    assert str(stitched.active_route) == ROUTE
    for wrong in ({"route": ROUTE, "budget": limit}, {"top_k": 0}, {"batch_size": 0}, {"on_error": "x"}):
        with pytest.raises(ValueError, match=r"one of route|at least 1|on_error="):
            stitched.predict(picture, **wrong)
    with pytest.raises(BudgetError, match="no route fits"):
        stitched.predict(picture, budget={"macs": 1})


def test_broken_pictures_have_an_empty_prediction(stitched, raw, tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    pictures = [raw[0]["image"], tmp_path / "a.png", raw[1]["image"]]
    found = stitched.predict(pictures, on_error="skip", batch_size=2)
    assert found[1] == [] and [found[0], found[2]] == [stitched.predict(pictures[index]) for index in (0, 2)]
    assert stitched.predict(tmp_path / "a.png", on_error="skip") == []
    with pytest.raises(PictureError, match=r"a\.png cannot be read"):
        stitched.predict(pictures)


def test_several_labels_have_scores_of_their_own(noise_model):
    noise_model.config.problem_type = "multi_label_classification"
    image = torch.randn(3, SIZE, SIZE)
    found = {row["label"]: row["score"] for row in noise_model.predict(image)}
    logits = noise_model(image[None]).logits[0]
    assert [found[f"LABEL_{index}"] for index in range(CLASSES)] == pytest.approx(logits.sigmoid().tolist())


@pytest.fixture
def noise_model():
    return StitchedModelForImageClassification.from_anchors(make_anchor("resnet"), make_anchor("vit"), order="given")


def test_threads_predict_by_their_own_routes(noise_model):
    images = torch.randn(6, 3, SIZE, SIZE)
    routes = [f"{name}[:]" for name in noise_model.anchors]
    expected = {route: noise_model.predict(images, route=route) for route in routes}
    wrong = []

    def work(route):
        for _ in range(10):
            wrong.extend([route] * (noise_model.predict(images, route=route) != expected[route]))

    threads = [threading.Thread(target=work, args=(route,)) for route in routes * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Image processors of plain modules


def test_a_plain_module_has_an_image_processor(tmp_path):
    how = Preprocessing((SIZE, SIZE + 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    modules = [load_anchor(make_model("plain"), name=name, preprocessing=how) for name in ("a", "b")]
    model = StitchedModelForImageClassification.from_anchors(*modules, order="given")
    assert Preprocessing.of(model.image_processor) == how and model.image_processor is model.image_processor
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8))
    resized = np.asarray(picture.resize((SIZE + 16, SIZE), Image.Resampling.BILINEAR), np.float32) / 255
    ours = model.image_processor(picture, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
    assert np.abs(ours.numpy() * how.std + how.mean - resized).max() < 0.02
    model.save_pretrained(tmp_path)
    saved = AutoImageProcessor.from_pretrained(tmp_path)
    again = saved(picture, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
    assert torch.equal(again, ours) or (older(transformers="5.17") and (again - ours).abs().max() < 0.03)
    classify = pipeline("image-classification", model=model, image_processor=model.image_processor)
    assert classify(picture)[0]["score"] == pytest.approx(model.predict(picture)[0]["score"], rel=1e-5)


# The classes of a new task


def test_classes_from_data(raw, shuffled):
    """Anchors that know the classes keep their heads; others get new ones with the names of the data."""
    known = StitchedModelForImageClassification.from_anchors(FRONT, END, labels_from=shuffled)
    assert not known.config.new_head and list(known.config.id2label.values()) == raw.features["label"].names
    task = raw.cast_column("label", ClassLabel(names=[f"kind {index}" for index in range(10)]))
    model = StitchedModelForImageClassification.from_anchors(FRONT, END, labels_from=task)
    assert model.config.new_head and model.config.id2label == {index: f"kind {index}" for index in range(10)}
    with pytest.raises(ValueError, match="labels_from gives the classes of the task; leave num_labels"):
        StitchedModelForImageClassification.from_anchors(FRONT, END, labels_from=task, num_labels=10)
    with pytest.raises(ValueError, match="labels_from names no classes"):
        StitchedModelForImageClassification.from_anchors(FRONT, END, labels_from=raw.select_columns("image"))


@pytest.mark.parametrize(
    ("function", "name"),
    [(load_anchor, "load_anchor"), (StitchedModelForImageClassification.from_anchors, "from_anchors")],
)
@pytest.mark.parametrize("source", [FRONT, make_model("plain")], ids=["folder", "module"])
def test_unknown_options_are_of_the_function_that_was_called(function, name, source):
    with pytest.raises(TypeError, match=rf"{name} takes no \['image_sise'\]; it takes .*'image_size'.*'token'"):
        function(source, image_sise=64)


# Trainer


@pytest.mark.parametrize("form", ["prepared", "raw"])
def test_trainer_with_its_defaults(stitched, raw, shuffled, tmp_path, form):
    """It drops columns that forward does not name, and kept none of the pictures."""
    data = with_pixel_values(raw, stitched.image_processor) if form == "prepared" else stitched.prepare_data(shuffled)
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    before = [tensor.clone() for tensor in stitched.stitches.state_dict().values()]
    trainer = Trainer(stitched, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    after = stitched.stitches.state_dict().values()
    assert not all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    predicted = trainer.predict(data)
    assert predicted.label_ids.tolist() == raw["label"][:] and predicted.metrics["test_loss"] > 0


def test_trainer_without_prepared_pictures(stitched, raw, tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True)
    with pytest.raises(ValueError, match=r"no pixel_values; prepare pictures with model\.prepare_data\(data\)"):
        Trainer(stitched, args, train_dataset=raw).train()


def test_raw_pictures_are_found_in_the_cache_of_similarities(demo_model, raw, monkeypatch):
    demo_model.compare(raw, ["position"])
    monkeypatch.delattr("restnet_hf.selection.mixin.compare")
    demo_model.compare(raw, ["position"])
    with pytest.raises(NameError):
        demo_model.compare(raw.select(range(9)), ["position"])
