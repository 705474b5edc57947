"""Training moves only what should move, by the right loss, and resumes where it stopped."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, SIZE, make_anchor
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from restnet_hf import StitchedModelForImageClassification, TrainArgs, train
from restnet_hf.checkpoints import KEPT
from restnet_hf.learning import Learner


ROUTES = ["resnet[:2] + vit[1:]", "resnet[:4] + vit[2:]"]


def build(**options):
    """The same model every time, two stitches."""
    model = StitchedModelForImageClassification.from_anchors(
        make_anchor("resnet"), make_anchor("vit", seed=1), **{"order": "given", **options}
    )
    torch.manual_seed(3)
    for route in ROUTES:
        model.add_stitch(route)
    return model


def data(size=24, classes=CLASSES):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    return TensorDataset(images, torch.arange(size) % classes)


FAST = {"num_train_epochs": 2, "batch_size": 8, "learning_rate": 3e-3}


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_activation_checkpointing_changes_nothing_else():
    """The same weights to the bit, and the switch is off again afterwards."""
    results = []
    for option in (False, True):
        model = build()
        train(model, data(), TrainArgs(activation_checkpointing=option, **FAST))
        assert not model.is_activation_checkpointing
        results.append(trained(model))
    assert all(torch.equal(value, results[0][name]) for name, value in results[1].items())


def test_only_stitches_move(images):
    model = build()
    with torch.no_grad():
        before = {name: anchor(images) for name, anchor in model.anchors.items()}
    start, frozen = trained(model), {k: v.clone() for k, v in model.anchors.state_dict().items()}
    result = train(model, data(), TrainArgs(**FAST))
    assert result.steps == 6 and result.losses.keys() == set(ROUTES)
    assert all(not torch.equal(value, start[name]) for name, value in trained(model).items())
    assert all(torch.equal(value, frozen[name]) for name, value in model.anchors.state_dict().items())
    with torch.no_grad():
        for name, anchor in model.anchors.items():
            assert torch.equal(anchor(images), before[name])
    assert not model.training


def test_loss_falls():
    model = build()
    first = train(model, data(), TrainArgs(num_train_epochs=1, batch_size=8, learning_rate=1e-9)).losses
    last = train(model, data(), TrainArgs(num_train_epochs=15, batch_size=8, learning_rate=1e-2)).losses
    assert all(last[route] < 0.8 * first[route] for route in ROUTES)


def test_loss_by_hand():
    """(1 - w) cross-entropy + w T² KL(teacher ‖ student), in float64, from probabilities."""
    model = build()
    args = TrainArgs(distillation=0.3, temperature=3.0)
    job = Learner(model, ROUTES, args)
    job.begin()
    images, labels = data()[:8]
    batch = {"pixel_values": images, "labels": labels}
    with torch.no_grad():
        losses = job.losses(batch, job.routes, False, False, nullcontext)
        found = {str(route): loss.item() for route, loss in zip(job.routes, losses, strict=True)}
        anchors = model.anchors
        largest = max(anchors, key=lambda name: sum(p.numel() for p in anchors[name].parameters()))
        teacher = anchors[largest](images).double()
        for route in ROUTES:
            model.set_route(route)
            student = model(images).logits.double()
            p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
            divergence = (p * (p / q).log()).sum(-1).mean()
            truth = -student.softmax(-1)[torch.arange(8), labels].log().mean()
            assert found[route] == pytest.approx((0.7 * truth + 0.3 * 9 * divergence).item(), rel=1e-4)


def test_stitches_train_as_they_would_alone():
    together, alone = build(), build()
    train(together, data(), TrainArgs(**FAST))
    train(alone, data(), TrainArgs(**FAST), routes=ROUTES[:1])
    name = "stitches.resnet_2__vit_1."
    for key, value in trained(alone).items():
        if key.startswith(name):
            assert torch.allclose(value, trained(together)[key], atol=1e-6)
        else:
            assert torch.equal(value, trained(build())[key])


def test_same_seed_same_result():
    results = []
    for seed in (0, 0, 1):
        model = build()
        train(model, data(), TrainArgs(seed=seed, **FAST))
        results.append(trained(model))
    same, other = ([torch.equal(results[0][key], r[key]) for key in r] for r in results[1:])
    assert all(same) and not all(other)


class Stops(TensorDataset):
    """Data that fails after so many batches, as a power cut would."""

    def __init__(self, dataset, after):
        super().__init__(*dataset.tensors)
        self.left = after

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.mark.parametrize("save_steps", [None, 2])
def test_resume_is_exact(tmp_path, save_steps):
    args = {"num_train_epochs": 3, "batch_size": 8, "learning_rate": 3e-3, "save_steps": save_steps}
    whole = build()
    train(whole, data(), TrainArgs(**args))
    out = str(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(build(), Stops(data(), 24 + 8 * 2 + 3), TrainArgs(output_dir=out, **args))
    again = build()
    with pytest.raises(ValueError, match="holds checkpoints of an earlier training"):
        train(again, data(), TrainArgs(output_dir=out, **args))
    train(again, data(), TrainArgs(output_dir=out, resume_from_checkpoint=True, **args))
    assert all(torch.equal(value, trained(again)[name]) for name, value in trained(whole).items())
    folders = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert len(folders) == KEPT and {file.name for file in (tmp_path / "run").iterdir()} - {"log.jsonl"} == {
        folder.name for folder in folders
    }
    for folder in folders:
        assert {file.name for file in folder.iterdir()} == {"training.safetensors", "training.json"}
        keys = load_file(folder / "training.safetensors")
        assert {key.split("/")[1].split(".")[0] for key in keys} == {"stitches"}
    with pytest.raises(ValueError, match="is of another training"):
        train(build(), data(16), TrainArgs(output_dir=out, resume_from_checkpoint=True, **args))


def test_heads(images):
    model = build(num_labels=3)
    start = trained(model)
    with pytest.raises(ValueError, match=r"new head of '.*' is not trained yet"):
        train(model, data(classes=3), TrainArgs(**FAST))
    args = TrainArgs(distillation=0.0, **FAST)
    train(model, data(classes=3), args, routes=["resnet[:]", "vit[:]"])
    moved = {name.split(".")[0] for name, value in trained(model).items() if not torch.equal(value, start[name])}
    assert moved == {"heads"}
    heads = {k: v for k, v in trained(model).items() if k.startswith("heads.")}
    train(model, data(classes=3), TrainArgs(train_head=False, **FAST))
    assert all(torch.equal(value, trained(model)[name]) for name, value in heads.items())
    assert all(p.grad is None for p in model.parameters())
    assert model.config.trained_heads == ["resnet", "vit"]
    train(model, data(classes=3), TrainArgs(**FAST))
    assert not torch.equal(heads["heads.vit.weight"], trained(model)["heads.vit.weight"])


def test_other_order():
    """The teacher is the larger anchor also where it is the end."""
    model = build(order="small-to-large")
    front = next(iter(model.anchors))
    end = ({"resnet", "vit"} - {front}).pop()
    model.add_stitch(f"{front}[:2] + {end}[1:]")
    result = train(model, data(), TrainArgs(**FAST), routes=[f"{front}[:2] + {end}[1:]"])
    assert len(result.losses) == 1


def test_learning_without_labels():
    model = build()
    images = [{"pixel_values": x} for x in data().tensors[0]]
    train(model, DataLoader(images, batch_size=8), TrainArgs(distillation=1.0, num_train_epochs=1))
    with pytest.raises(ValueError, match="train_set has no labels"):
        train(model, DataLoader(images, batch_size=8), TrainArgs(num_train_epochs=1))


def test_refused():
    model = build()
    with pytest.raises(ValueError, match="nothing to train"):
        train(model, data(), routes=["resnet[:]"])
    with pytest.raises(ValueError, match="labels run from 0 to 6, but the model has 5 classes"):
        train(model, data(classes=7), TrainArgs(**FAST))
    with pytest.raises(ValueError, match="train_set is empty"):
        train(model, TensorDataset(torch.zeros(0, 3, SIZE, SIZE), torch.zeros(0)))
    with pytest.raises(ValueError, match="pixel_values must have shape"):
        train(model, TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)))
    bad = TensorDataset(torch.full((8, 3, SIZE, SIZE), float("nan")), torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match="the loss of route .* is nan at step 0"):
        train(model, bad)


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": -1}, {"batch_size": 0}, {"distillation": 2}, {"epochs": 3}, {"mixed_precision": "int8"}],
)
def test_bad_options(options):
    with pytest.raises(ValidationError):
        TrainArgs(**options)


def test_trackers(tmp_path):
    """Any tracker that Accelerate knows; a custom one sees the losses."""
    from accelerate.tracking import GeneralTracker

    class Memory(GeneralTracker):
        name, requires_logging_directory = "memory", False

        def __init__(self):
            super().__init__()
            self.entries = []

        @property
        def tracker(self):
            return self.entries

        def store_init_configuration(self, values):
            self.entries.append(values)

        def log(self, values, step=None, **kwargs):
            self.entries.append({**values, "step": step})

    memory = Memory()
    train(build(), data(), TrainArgs(logging_steps=2, log_with=memory, **FAST))
    assert memory.entries[0]["learning_rate"] == FAST["learning_rate"]
    assert [entry["step"] for entry in memory.entries[1:]] == [2, 4, 6]
    assert f"loss/{ROUTES[0]}" in memory.entries[1]


TWO_PROCESSES = """
import sys
import torch
from accelerate import PartialState
from conftest import *
from safetensors.torch import save_file
from test_training import FAST, build, data, trained
from torch.utils.data import DataLoader
from restnet_hf import TrainArgs, train

model = build()
train(model, data(), TrainArgs(**FAST))
profile = model.profile(DataLoader(data(), batch_size=5))
state = PartialState()
scores = torch.tensor([row.scores["accuracy"] for row in profile.routes] + [profile.metadata["images"]])
if state.is_main_process:
    save_file(trained(model) | {"scores": scores, "processes": torch.tensor(state.num_processes)}, sys.argv[1])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def test_two_processes_give_what_one_gives(tmp_path):
    """The images of a step are shared out; what is learned agrees to float32 rounding, the scores exactly."""
    (tmp_path / "job.py").write_text(TWO_PROCESSES)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parent)}
    one, two = (
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    )
    found = []
    for index, launch in enumerate((one, two)):
        out = tmp_path / f"{index}.safetensors"
        subprocess.run([*launch, "job.py", str(out)], cwd=tmp_path, env=environment, check=True, capture_output=True)
        found.append(load_file(out))
    assert [int(result.pop("processes")) for result in found] == [1, 2]
    assert torch.equal(*(result.pop("scores") for result in found))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer(checkpointing, tmp_path):
    """The same model under ``transformers.Trainer``: only stitches move, and its checkpoints are adapters."""
    model = build()
    model.set_route(ROUTES[0])
    frozen = {key: value.clone() for key, value in model.anchors.state_dict().items()}
    start = trained(model)
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in data()]
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True}
    options["activation_checkpointing"] = checkpointing
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", disable_tqdm=True, save_strategy="epoch", **options
    )
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert all(torch.equal(value, frozen[key]) for key, value in model.anchors.state_dict().items())
    moved = {key for key, value in trained(model).items() if not torch.equal(value, start[key])}
    assert moved == {key for key in start if key.startswith("stitches.resnet_2__vit_1.")}
    saved = load_file(next(tmp_path.glob("checkpoint-*")) / "model.safetensors")
    assert saved.keys() == start.keys()
    assert all(torch.equal(value, trained(model)[key]) for key, value in saved.items())
