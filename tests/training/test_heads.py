"""New heads train on features that the frozen anchors give once; `train` trains those that it needs first."""

import pytest
import torch
from conftest import make_anchor
from torch.utils.data import DataLoader, TensorDataset
from trainings import FAST, ROUTES, build, data, trained

from restnet_hf import StitchedModelForImageClassification, TrainArgs, train, train_heads
from restnet_hf.training import loop


ALONE = ["resnet[:]", "vit[:]"]


class Counted(TensorDataset):
    """Counts how often an image is read."""

    reads = 0

    def __getitem__(self, index):
        type(self).reads += 1
        return super().__getitem__(index)


def new_task(seed=0):
    torch.manual_seed(seed)
    return build(num_labels=3)


def test_each_image_is_read_once_and_heads_learn():
    model, rows = new_task(), Counted(*data(classes=3).tensors)
    start = trained(model)
    result = train_heads(model, rows)
    assert Counted.reads == len(rows) + 1  # what kind of items they are, is seen from the first
    assert result.steps <= 20 and [*result.losses] == ALONE
    moved = {name.split(".")[0] for name, value in trained(model).items() if not torch.equal(value, start[name])}
    assert moved == {"heads"} and model.config.trained_heads == ["resnet", "vit"]
    stage = model.config.training[-1]
    assert (stage["stage"], stage["images"], stage["routes"], stage["held_out_images"]) == ("heads", 12, 2, 12)
    with pytest.raises(ValueError, match="no heads to train: all new heads are trained"):
        train_heads(model, rows)
    with pytest.raises(ValueError, match="the model has the anchors' own heads"):
        train_heads(build(), data())


@pytest.mark.parametrize("cached", [False, True])
def test_heads_are_those_of_the_loop(cached, tmp_path):
    """Step by step what `train` gives on the images themselves, up to rounding; on disk to half precision."""
    options = {"num_train_epochs": 3, "batch_size": 8, "distillation": 0.0, "keep": "last"}
    heads, plain = new_task(), new_task()
    train_heads(heads, data(classes=3), TrainArgs(**options, cache_dir=str(tmp_path) if cached else None))
    train(plain, data(classes=3), TrainArgs(**options), ALONE)
    for name, value in trained(plain).items():
        assert torch.allclose(value, trained(heads)[name], atol=2e-3 if cached else 1e-5)


def test_a_loader_and_a_stream():
    images, labels = data(classes=3).tensors
    loader, stream = new_task(), new_task()
    train_heads(loader, DataLoader(TensorDataset(images, labels), batch_size=5))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(images, labels, strict=True))

    train_heads(stream, Stream(), TrainArgs(max_steps=4, batch_size=4))
    assert stream.config.training[-1]["images"] == 12 and stream.config.training[-1]["steps"] == 4


def test_train_trains_missing_heads_first(caplog):
    model = new_task()
    result = train(model, data(classes=3), TrainArgs(**FAST))
    assert "['resnet', 'vit'] are trained first" in caplog.text and [*result.losses] == ROUTES
    assert [stage["stage"] for stage in model.config.training] == ["heads", "training"]
    caplog.clear()
    train(model, data(classes=3), TrainArgs(**FAST))
    assert not caplog.messages


def test_train_without_labels_needs_no_heads():
    model = new_task()
    train(model, data().tensors[0], TrainArgs(matching_epochs=1, num_train_epochs=0, batch_size=8))
    assert model.config.trained_heads == []


def test_heads_of_some_anchors():
    model = new_task()
    start = trained(model)
    assert [*train_heads(model, data(classes=3), anchors=["vit"]).losses] == ["vit[:]"]
    assert model.config.trained_heads == ["vit"]
    moved = {name for name, value in trained(model).items() if not torch.equal(value, start[name])}
    assert moved and all(name.startswith("heads.vit.") for name in moved)
    with pytest.raises(ValueError, match="no heads to train"):
        train_heads(model, data(classes=3), anchors=["vit"])


def test_a_copy_of_a_trained_head_is_trained():
    model = new_task()
    train_heads(model, data(classes=3))
    model.add_stitch("night: resnet[:2] + vit[1:]")
    assert model.config.trained_heads == ["night:resnet", "night:vit", "resnet", "vit"]


def test_a_failure_leaves_heads_as_they_were(monkeypatch):
    """Also where they were trained for the training that failed."""
    model = new_task()
    start = trained(model)
    monkeypatch.setattr(loop.Training, "record", lambda *_: 1 / 0)
    for run in (train_heads, train):
        with pytest.raises(ZeroDivisionError):
            run(model, data(classes=3))
        assert all(torch.equal(value, start[name]) for name, value in trained(model).items())
        assert model.config.trained_heads == []


@pytest.mark.parametrize(
    "options", [{"matching_epochs": 1}, {"tuning": "norm"}, {"train_head": False}, {"least_squares_images": 9}]
)
def test_options_of_stitches_are_refused(options):
    with pytest.raises(ValueError, match=f"train_heads trains new heads alone.*{next(iter(options))}"):
        train_heads(new_task(), data(classes=3), TrainArgs(**options))


def test_selectors_that_need_heads_name_train_heads():
    model = StitchedModelForImageClassification.from_anchors(make_anchor("resnet"), make_anchor("vit"), num_labels=3)
    with pytest.raises(ValueError, match="not trained yet; call train_heads"):
        model.select_stitches(data(classes=3), method="fitted_accuracy")
