"""Training moves only what should move, by the right loss, and resumes where it stopped."""

import copy
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import SIZE, make_anchor
from datasets import Dataset
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset
from trainings import FAST, ROUTES, Noisy, build, data, trained
from transformers import Trainer, TrainingArguments
from versions import needs_tensor_format, older

from restnet_hf import StitchedModelForImageClassification, TrainArgs, train, train_heads
from restnet_hf.training.checkpoints import KEPT
from restnet_hf.training.learner import Learner
from restnet_hf.training.teachers import make_teacher


def test_activation_checkpointing_changes_nothing_else():
    """The same weights to the bit, and the switch is off again afterwards."""
    results = []
    for option in (False, True):
        model = build()
        train(model, data(), TrainArgs(activation_checkpointing=option, **FAST))
        assert not any(anchor.gradient_checkpointing for anchor in model.anchors.values())
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
    last = train(model, data(), TrainArgs(num_train_epochs=15, batch_size=8, learning_rate=1e-2, keep="last")).losses
    assert all(last[route] < 0.8 * first[route] for route in ROUTES)


def test_loss_by_hand():
    """(1 - w) cross-entropy + w T² KL(teacher ‖ student), in float64, from probabilities."""
    model = build()
    args = TrainArgs(distillation=0.3, temperature=3.0, teacher="vit")
    images, labels = data()[:8]
    job = Learner(model, ROUTES, args, teacher=make_teacher(model, args, list))
    batch = {"pixel_values": images, "labels": labels}
    with torch.no_grad():
        losses = job.losses(batch, job.routes, False, False, nullcontext)
        found = {str(route): loss.item() for route, loss in zip(job.routes, losses, strict=True)}
        teacher = model.anchors["vit"](images).double()
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
    args = {**FAST, "num_train_epochs": 3, "save_steps": save_steps}
    whole = build()
    train(whole, data(), TrainArgs(**{**args, "save_steps": None}))
    out = str(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(build(), Stops(data(), 24 + 24 + 8 * 2 + 3), TrainArgs(output_dir=out, **args))
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
    with pytest.raises(ValueError, match="belongs to another training"):
        train(build(), data(16), TrainArgs(output_dir=out, resume_from_checkpoint=True, **args))


def test_heads(images):
    model = build(num_labels=3)
    start = trained(model)
    with pytest.raises(ValueError, match=r"new head of '.*' is not trained yet.*train_heads"):
        make_teacher(model, TrainArgs(**FAST), list)
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
    """The end teaches as well as the front does."""
    model = build(order="small-to-large")
    front = next(iter(model.anchors))
    end = ({"resnet", "vit"} - {front}).pop()
    model.add_stitch(f"{front}[:2] + {end}[1:]")
    result = train(model, data(), TrainArgs(**FAST), routes=[f"{front}[:2] + {end}[1:]"])
    assert len(result.losses) == 1
    result = train(model, data(), TrainArgs(**FAST, teacher=end), routes=[f"{front}[:2] + {end}[1:]"])
    assert result.teacher == end


def test_images_whose_label_is_ignored():
    """-100: they have no part in the cross-entropy, and still learn from the teacher."""
    model, args = build(), TrainArgs(distillation=0.3, teacher="vit")
    job = Learner(model, ROUTES, args, teacher=make_teacher(model, args, list))
    images, labels = data()[:8]

    def losses(images, labels):
        batch = {"pixel_values": images, "labels": labels}
        with torch.no_grad():
            return list(job.losses(batch, job.routes, False, False, nullcontext))

    some, none = labels.clone(), torch.full_like(labels, -100)
    some[2:] = -100
    mixed, taught = torch.stack(losses(images, some)), torch.stack(losses(images, none))
    assert (taught > 0).all()
    known = torch.stack(losses(images[:2], labels[:2])) - torch.stack(losses(images[:2], none[:2]))
    assert torch.allclose(mixed - taught, known, atol=1e-5)
    result = train(model, TensorDataset(images, none), TrainArgs(num_train_epochs=1, batch_size=4, distillation=0))
    assert all(loss == 0 for loss in result.losses.values())


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
    [
        *({"learning_rate": -1}, {"batch_size": 0}, {"distillation": 2}, {"epochs": 3}, {"mixed_precision": "int8"}),
        *({"save_steps": 5}, {"resume_from_checkpoint": True}),
    ],
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
from trainings import FAST, WAYS, build, data, trained
from torch.utils.data import DataLoader
from restnet_hf import TrainArgs, train

found = {}
for name, options in WAYS.items():
    model = build()
    train(model, data(), TrainArgs(**{**FAST, **options}))
    found |= {f"{name}: {key}": value for key, value in trained(model).items()}
profile = model.profile(DataLoader(data(), batch_size=5))
state = PartialState()
scores = torch.tensor([row.scores["accuracy"] for row in profile.routes] + [profile.metadata["images"]])
if state.is_main_process:
    save_file(found | {"scores": scores, "processes": torch.tensor(state.num_processes)}, sys.argv[1])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """The images of a step are shared out; what is learned agrees to float32 rounding, the scores exactly."""
    (tmp_path / "job.py").write_text(TWO_PROCESSES)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    one, two = (
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    )
    found = []
    for index, launch in enumerate((one, two)):
        out = tmp_path / f"{index}.safetensors"
        subprocess.run(
            [*launch, str(tmp_path / "job.py"), str(out)],
            cwd=tmp_path_made(tmp_path / str(index)),
            env=environment,
            check=True,
            capture_output=True,
        )
        found.append(load_file(out))
    assert [int(result.pop("processes")) for result in found] == [1, 2]
    assert torch.equal(*(result.pop("scores") for result in found))
    start = trained(build())
    for key, value in found[0].items():
        name = key.split(": ")[1]
        if name.endswith("k_proj/bias"):
            continue  # softmax does not see it: its gradient is rounding, of which Adam makes full steps
        assert torch.allclose(value, found[1][key], atol=2e-5), key
        moved = name not in start or not torch.allclose(value, start[name], atol=1e-3)
        assert moved or key.startswith("best"), f"{key} hardly moved"  # the best may be what it was


def tmp_path_made(path):
    """A folder, made."""
    path.mkdir()
    return path


def test_parts_of_a_batch_give_the_whole():
    """Gradient accumulation changes memory, not the result."""
    whole, parts = build(), build()
    train(whole, data(), TrainArgs(**FAST))
    train(parts, data(), TrainArgs(gradient_accumulation_steps=3, **FAST))
    assert all(torch.allclose(value, trained(parts)[name], atol=1e-5) for name, value in trained(whole).items())


@pytest.mark.slow
def test_memory_that_runs_out():
    """Parts become smaller until they fit, and the result is that of the whole batch."""

    class Crowded(torch.nn.Module):
        """A stitch on a device that holds four images."""

        def __init__(self, inner):
            super().__init__()
            self.inner, self.sizes = inner, []

        def forward(self, x):
            self.sizes.append(len(x))
            if len(x) > 4:
                torch.empty(2**50)  # more than any machine has: a real error of the allocator
            return self.inner(x)

    whole, parts = build(), build()
    train(whole, data(), TrainArgs(**FAST), ROUTES[:1])
    name = whole.route(ROUTES[0]).stitch_points[0].name
    parts.stitches[name] = Crowded(parts.stitches[name])
    train(parts, data(), TrainArgs(auto_find_batch_size=True, **FAST), ROUTES[:1])
    sizes = parts.stitches[name].sizes
    assert sizes[0] == 8 and max(sizes[-6:]) <= 4
    found = parts.stitches[name].inner.state_dict()
    assert all(
        torch.allclose(value, found[key], atol=1e-5) for key, value in whole.stitches[name].state_dict().items()
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by the compiler itself
@pytest.mark.parametrize(
    "options", [{"channels_last": True}, {"torch_compile": True, "torch_compile_backend": "eager"}]
)
def test_faster_ways_give_the_same(options):
    plain, fast = build(), build()
    train(plain, data(), TrainArgs(**FAST))
    train(fast, data(), TrainArgs(**options, **FAST))
    assert all(torch.allclose(value, trained(fast)[name], atol=1e-4) for name, value in trained(plain).items())
    assert all(p.is_contiguous() for p in fast.parameters())


def images_seen(anchor):
    """A list that grows with the size of each batch that the anchor's network sees whole or from the image on."""
    seen = []
    first = next(module for module in anchor.model.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 2e-2)])
def test_features_kept_on_disk(dtype, tolerance, tmp_path):
    """The same result up to the rounding of activations; the front sees each image once, later never."""
    plain, kept, again = build(), build(), build()
    args = {"teacher": "resnet", "num_train_epochs": 3, "batch_size": 8, "learning_rate": 3e-3}
    train(plain, data(), TrainArgs(**args))
    cache = {"cache_dir": str(tmp_path), "cache_dtype": dtype}
    seen, later = images_seen(kept.anchors["resnet"]), images_seen(again.anchors["resnet"])
    train(kept, data(), TrainArgs(**args, **cache))
    assert sum(seen) == 24
    train(again, data(), TrainArgs(**args, **cache))
    assert not later
    for name, value in trained(plain).items():
        assert torch.allclose(value, trained(kept)[name], atol=tolerance)
        assert torch.equal(trained(again)[name], trained(kept)[name])
    again.add_stitch("resnet[:3] + vit[1:]")
    train(again, data(), TrainArgs(**args, **cache))
    assert sum(later) == 24, "only the new cut is to be computed"
    with pytest.raises(ValueError, match="cache_dir needs images that are the same each time"):
        train(build(), Stops(data(), 10**6), TrainArgs(**args, **cache))


@pytest.mark.parametrize("options", [{}, {"sampler": "importance"}, {"matching_epochs": 1}, {"tuning": "norm"}])
def test_resume_in_the_middle_of_an_epoch_is_exact(options, tmp_path):
    """To the last bit, with random augmentation, whatever was being done."""
    args = {**FAST, "save_steps": 1, **options}
    whole, again, images = build(), build(), Noisy(data())
    train(whole, images, TrainArgs(**{**args, "save_steps": None}))
    out = str(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(build(), Noisy(data(), 10**9 - images.left - 4), TrainArgs(output_dir=out, **args))
    steps = 3 * (2 + ("matching_epochs" in options))
    assert not Path(out, f"checkpoint-{steps}").exists() and Path(out, f"checkpoint-{steps - 2}").exists()
    train(again, Noisy(data()), TrainArgs(output_dir=out, resume_from_checkpoint=True, **args))
    found = trained(again)
    assert all(torch.equal(value, found[name]) for name, value in trained(whole).items())
    buffers = dict(again.tuned.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in whole.tuned.named_buffers())


def test_workers_read_what_one_process_reads():
    """Augmentation depends on seed, epoch and index, not on who reads."""
    results = []
    for workers in (0, 2):
        model = build()
        train(model, Noisy(data()), TrainArgs(dataloader_num_workers=workers, **FAST))
        results.append(trained(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


class Stream(torch.utils.data.IterableDataset):
    """Images without an end that anyone knows."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from ({"pixel_values": image, "labels": label} for image, label in self.rows)


def test_data_that_stream():
    model = build()
    with pytest.raises(ValueError, match="its epochs cannot be counted: give max_steps"):
        train(model, Stream(data()), TrainArgs(**FAST))
    result = train(model, Stream(data()), TrainArgs(max_steps=5, least_squares_images=16, **FAST))
    assert result.steps == 5
    assert train(build(), data(), TrainArgs(max_steps=5, **{**FAST, "num_train_epochs": 1000})).steps == 5


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path):
    """The images of the third batch are NaN."""
    rows = data()
    rows.tensors[0][16:] = float("nan")
    loader = DataLoader(rows, batch_size=8)
    out = str(tmp_path / "run")
    with pytest.raises(ValueError, match="the loss of route .* is nan at step 2; .* written so far are valid"):
        train(build(), loader, TrainArgs(output_dir=out, save_steps=1, **FAST))
    (whole, fine) = build(), DataLoader(data(), batch_size=8)
    train(whole, fine, TrainArgs(**FAST))
    again = build()
    train(again, fine, TrainArgs(output_dir=out, save_steps=1, resume_from_checkpoint=True, **FAST))
    assert all(torch.equal(value, trained(again)[name]) for name, value in trained(whole).items())


STOPPED = """
import os, resource, signal, sys, threading
from conftest import *
from trainings import FAST, Noisy, build, data, trained
from restnet_hf import TrainArgs, train

how, out = sys.argv[1:]
args = {**FAST, "output_dir": out, "num_train_epochs": 4, "teacher": "resnet"}  # auto would read images


class Rows(Noisy):
    def __getitem__(self, index):
        self.left -= 1
        if self.left == 10**9 - 24 - 8 * 2:
            if how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        image, label = self.rows[index]
        return image + 0.3 * torch.randn(image.shape), label


signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
train(build(), Rows(data()), TrainArgs(**args))
"""


@pytest.mark.slow
def test_stopped_from_outside(tmp_path):
    """SIGTERM saves and exits with 143; a disk that is full is an OSError; both go on exactly where they were."""
    (tmp_path / "job.py").write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    whole = build()
    args = {**FAST, "num_train_epochs": 4, "teacher": "resnet"}
    train(whole, Noisy(data()), TrainArgs(**args))
    jobs = {
        how: subprocess.Popen(
            [sys.executable, str(tmp_path / "job.py"), how, str(tmp_path / how)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for how in ("signal", "disk")
    }
    printed = {how: job.communicate()[1] for how, job in jobs.items()}
    assert jobs["signal"].returncode == 143 and "Traceback" not in printed["signal"], printed["signal"]
    assert jobs["disk"].returncode == 1 and "cannot be written to" in printed["disk"].splitlines()[-1], printed["disk"]
    assert "Free some disk space and go on with resume_from_checkpoint=True from checkpoint-3" in printed["disk"]
    assert not [file for file in (tmp_path / "disk").iterdir() if file.name.startswith(".")], "a half-written folder"
    for how in jobs:
        again = build()
        train(again, Noisy(data()), TrainArgs(output_dir=str(tmp_path / how), resume_from_checkpoint=True, **args))
        assert all(torch.equal(value, trained(again)[name]) for name, value in trained(whole).items()), how


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer(checkpointing, tmp_path):
    """The same model under ``transformers.Trainer``: only stitches move, and its checkpoints are adapters."""
    model = build()
    model.set_route(ROUTES[0])
    frozen = {key: value.clone() for key, value in model.anchors.state_dict().items()}
    start = trained(model)
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in data()]
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True}
    names = {field.name for field in fields(TrainingArguments)}  # the second of these is the older one
    option = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    options[option] = checkpointing
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


@pytest.mark.parametrize("rows", [pytest.param("data set", marks=needs_tensor_format), "list"])
def test_trainer_without_a_stitch(rows, tmp_path):
    """A clear message in place of autograd's, with the Trainer's own defaults."""
    model = StitchedModelForImageClassification.from_anchors(make_anchor("resnet"), make_anchor("vit", seed=1))
    items = [{"pixel_values": image.numpy(), "labels": int(label)} for image, label in data(4)]
    train_set = Dataset.from_list(items).with_format("torch") if rows == "data set" else items
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True)
    with pytest.raises(ValueError, match=r"nothing on 'resnet\[:\]' can train: .*model.add_stitch"):
        Trainer(model, args, train_dataset=train_set).train()


STATES = {
    "loss": {"learning_rate": 1e30, "max_grad_norm": 1e30},
    "data": {},
    "tuned": {"tuning": "norm"},
}


@pytest.mark.parametrize("failure", STATES)
def test_a_failed_training_changes_nothing(failure):
    """Not finite in the middle, or an error of the data: weights, records and profile are those of before."""
    model = build()
    model.fit_stitches(data().tensors[0])
    profile = model.profile(data())
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    rows = data() if failure == "loss" else Stops(data(), 12 + 24)
    with pytest.raises((ValueError, KeyboardInterrupt)):
        train(model, rows, TrainArgs(least_squares_images=12, num_train_epochs=20, batch_size=8, **STATES[failure]))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[key]) for key, value in after.items())
    assert model.config.to_dict() == config and model.profiled is profile
    assert not model.training


def half(dtype=torch.float16, **options):
    """The model of `build` with its anchors in half precision."""
    anchors = make_anchor("resnet").to(dtype), make_anchor("vit", seed=1).to(dtype)
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given", **options)
    torch.manual_seed(3)
    model.add_stitches(ROUTES)
    return model


def own_types(model):
    return {tensor.dtype for tensor in model.adapter_state_dict().values()}


BFLOAT16 = pytest.mark.xfail(
    older(transformers="5.17"),
    reason="on processors with bfloat16 the networks of older versions are 0.77 off",
    strict=False,
)


@pytest.mark.parametrize(
    ("tuning", "dtype"),
    [
        *(("stitch", torch.float16), ("norm", torch.float16), ("full", torch.bfloat16)),
        pytest.param("lora", torch.bfloat16, marks=BFLOAT16),
        *(pytest.param(tuning, torch.float16, marks=pytest.mark.slow) for tuning in ("lora", "full")),
    ],
)
def test_half_anchors_train_in_float32(tuning, dtype, images):
    """Stitches and tuned weights move, in float32; the anchors keep type and logits to the last bit."""
    model = half(dtype)
    frozen = {key: value.clone() for key, value in model.anchors.state_dict().items()}
    args = TrainArgs(least_squares_images=12, tuning=tuning, num_train_epochs=1, batch_size=8, teacher="resnet")
    result = train(model, data(), args)
    assert all(math.isfinite(loss) for loss in result.losses.values())
    assert own_types(model) == {torch.float32} and model.dtype == dtype
    assert all(torch.equal(value, frozen[key]) for key, value in model.anchors.state_dict().items())
    single = build()
    train(single, data(), args)
    logits = [each(images, route=ROUTES[1]).logits for each in (model, single)]
    most = 0.7 if older(transformers="5.17") else 0.2  # there the random networks are others
    assert logits[0].dtype == dtype and (logits[0] - logits[1]).abs().max() < most * logits[1].std()
    assert torch.equal(model.bake(ROUTES[1])(images.to(dtype)), logits[0])


def test_half_casts_all_and_training_casts_back(images, caplog):
    """As in PEFT ``half()`` casts all; what trains then is float32 again, and a warning says so."""
    model = build(num_labels=3)
    model.half()
    assert own_types(model) == {torch.float16} and model(images).logits.dtype == torch.float16
    train_heads(model, data(classes=3))
    assert {p.dtype for p in model.heads.parameters()} == {torch.float32} and "half precision" in caplog.text
    model.fit_stitches(images)
    assert own_types(model) == {torch.float32}
    assert model(images, route=ROUTES[0]).logits.dtype == torch.float16


def test_overflow_of_float16_is_named():
    model = half()
    start = trained(model)
    with torch.no_grad():
        model.stitches["resnet_2__vit_1"].proj.weight.mul_(1e6)
    huge = trained(model)
    with pytest.raises(ValueError, match="nan at step 0; the anchors compute in float16, .*dtype='float32' or"):
        train(model, data(), TrainArgs(**FAST))
    assert all(torch.equal(value, huge[key]) for key, value in trained(model).items()) and start.keys() == huge.keys()
