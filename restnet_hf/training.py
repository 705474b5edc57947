"""The one training loop: only stitches (and, if asked, new heads) learn; runs under Accelerate."""

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from restnet_hf.data import Batch, as_batch, check_labels
from restnet_hf.files import folder_written_whole
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.routes import Route, Segment
from restnet_hf.steps import Step, run_steps


KEPT_CHECKPOINTS = 2
PLACE = "training.json"  # of a checkpoint
NOT_SETTINGS = {
    "output_dir",
    "save_steps",
    "resume_from_checkpoint",
    "logging_steps",
    "log_with",
}  # of what is learned


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainArgs:
    """Options of `train`; names as in ``transformers.TrainingArguments`` where both have them.

    Args:
        output_dir: where checkpoints go; None for no checkpoints.
        num_train_epochs: passes over the data.
        batch_size: images in a step, over all processes.
        learning_rate: the highest, after the warm-up; it falls to zero as a cosine.
        weight_decay: of AdamW.
        warmup_ratio: share of the steps in which the learning rate rises.
        max_grad_norm: the gradient of each stitch and head is clipped to this norm.
        distillation: weight of the distillation from the largest anchor; the rest is cross-entropy. 1 needs no
            labels. A new head of that anchor must have been trained before, with 0.
        temperature: of the distillation (Hinton et al., arXiv 1503.02531).
        train_head: train new heads too; None does if the model has any.
        save_steps: steps between checkpoints; None for one at the end of each epoch.
        resume_from_checkpoint: go on from the last checkpoint in ``output_dir``, if there is one.
        logging_steps: steps between entries for the trackers.
        log_with: trackers, as in ``Accelerator``.
        mixed_precision: as in ``Accelerator``.
        activation_checkpointing: keep activations at cuts alone, and compute the others again on the way back.
        seed: of the order of the data.
    """

    output_dir: str | None = None
    num_train_epochs: int = Field(default=3, gt=0)
    batch_size: int = Field(default=64, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    distillation: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=2.0, gt=0)
    train_head: bool | None = None
    save_steps: int | None = Field(default=None, gt=0)
    resume_from_checkpoint: bool = False
    logging_steps: int = Field(default=10, gt=0)
    log_with: Any = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    activation_checkpointing: bool = False
    seed: int = 0


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns: steps done, seconds taken, and each route's mean loss over the last epoch."""

    steps: int
    seconds: float
    losses: dict[str, float]


def train(
    model: StitchedModelForImageClassification,
    train_set: Any,
    args: TrainArgs | None = None,
    routes: Iterable[Route | str] | None = None,
) -> TrainResult:
    """Train the stitches of routes, all of them on every batch.

    Each batch runs once through the front, without gradients, and from each cut on through its stitch and the end. The
    stitches do not share weights, so each learns as it would alone. The anchors do not change.

    Args:
        model: with stitches, best fitted by least squares first.
        train_set: a map-style dataset, or a DataLoader, of ``pixel_values`` and ``labels``.
        args: options.
        routes: which to train; the stitched ones by default. Anchors alone have only a new head to train.

    Raises:
        ValueError: nothing would train, labels are missing or out of range, or the loss is not finite.
    """
    return _Training(model, train_set, args or TrainArgs(), routes).run()


class _Training:
    """State of one run of `train`."""

    def __init__(
        self,
        model: StitchedModelForImageClassification,
        train_set: Any,
        args: TrainArgs,
        routes: Iterable[Route | str] | None,
    ) -> None:
        self.model, self.args = model, args
        chosen = [model.route(route) for route in (model.routes if routes is None else routes)]
        self.walks = {route: model.steps(route) for route in chosen}
        self.teacher = self._teacher()
        self.modules = self._trainable(chosen)
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=args.log_with,
            project_dir=args.output_dir,
            dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
        )
        set_seed(args.seed)
        if not hasattr(train_set, "__len__"):
            raise ValueError("train_set must have a length: a map-style dataset, or a DataLoader of one")
        if not len(train_set):
            raise ValueError("train_set is empty: at least one image is needed")
        loader = train_set
        if not isinstance(loader, DataLoader):
            loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
        model.to(self.accelerator.device)  # before the optimizer sees the parameters
        self.parameters = {f"{key}.{n}": p for key, m in self.modules.items() for n, p in m.named_parameters()}
        total = len(loader) * args.num_train_epochs
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=args.learning_rate, weight_decay=args.weight_decay, foreach=True
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, int(args.warmup_ratio * total), total)
        self.loader, self.optimizer, self.schedule = self.accelerator.prepare(loader, optimizer, schedule)
        self.total, self.step = total, 0
        self.losses: dict[Route, list[float]] = {}

    def _trainable(self, routes: Sequence[Route]) -> dict[str, nn.Module]:
        names = {point.name for route in routes for point in route.stitch_points}
        modules: dict[str, nn.Module] = {f"stitches.{name}": self.model.stitches[name] for name in sorted(names)}
        if self.args.train_head is not False:
            ends = {route.head for route in routes}
            modules |= {f"heads.{name}": head for name, head in self.model.heads.items() if name in ends}
        if not modules:
            raise ValueError(
                "there is nothing to train: give routes with stitches (select_stitches or add_stitch makes them), or "
                "ask for train_head=True on a model built with num_labels= or id2label="
            )
        return modules

    def _teacher(self) -> tuple[Route, tuple[Step, ...]] | None:
        if not self.args.distillation:
            return None
        anchors = self.model.anchors
        largest = max(anchors, key=lambda name: anchors[name].num_parameters())
        if self.model.config.new_head and largest not in self.model.config.trained_heads:
            raise ValueError(
                f"the new head of '{largest}' is not trained yet, so there is nothing to distil from it. Train heads "
                f"first, train(..., TrainArgs(distillation=0), routes=['{largest}[:]', ...]), or set distillation=0"
            )
        route = Route((Segment(largest),))
        return route, self.model.steps(route)

    def run(self) -> TrainResult:
        args, accelerator = self.args, self.accelerator
        began = time.perf_counter()
        if args.log_with is not None:
            accelerator.init_trackers("restnet_hf", config={k: v for k, v in vars(args).items() if v is not None})
        if args.output_dir is not None and (checkpoints := self._checkpoints()):
            if not args.resume_from_checkpoint:
                raise ValueError(
                    f"{args.output_dir} holds checkpoints of an earlier training; go on from them with "
                    "resume_from_checkpoint=True, or choose another output_dir"
                )
            self._resume(checkpoints[-1])
        with self._only_these_train():
            self._epochs()
        for tracker in accelerator.trackers:  # end_training() would also end the process group
            tracker.finish()
        trained = {key.removeprefix("heads.") for key in self.modules if key.startswith("heads.")}
        self.model.config.trained_heads = sorted(trained.union(self.model.config.trained_heads))
        self.model.profiled = None  # it was of the stitches as they were
        self._record(time.perf_counter() - began)
        means = {str(route): sum(losses) / len(losses) for route, losses in self.losses.items() if losses}
        return TrainResult(self.step, time.perf_counter() - began, means)

    def _record(self, seconds: float) -> None:
        """Write into config.json, for the card, how it was trained."""
        settings = {key: value for key, value in vars(self.args).items() if key not in NOT_SETTINGS}
        done = {"images": len(self.loader.dataset), "routes": len(self.walks), "steps": self.step}
        processes = {"processes": self.accelerator.num_processes, "seconds": round(seconds, 1)}
        self.model.config.training = [
            *self.model.config.training,
            {"stage": "training", **done, **settings, **processes},
        ]

    @contextmanager
    def _only_these_train(self) -> Iterator[None]:
        """Training mode, and no gradients for stitches and heads that take no part; as before afterwards."""
        mine = set(self.parameters.values())
        others = [p for p in self.model.parameters() if p.requires_grad and p not in mine]
        for parameter in others:
            parameter.requires_grad_(False)
        self.model.train()
        self.optimizer.zero_grad()
        before = all(anchor.gradient_checkpointing for anchor in self.model.anchors.values())
        checkpoints = self.args.activation_checkpointing and not before
        if checkpoints:
            self.model.activation_checkpointing_enable()
        try:
            yield
        finally:
            self.optimizer.zero_grad()
            if checkpoints:
                self.model.activation_checkpointing_disable()
            self.model.eval()
            for parameter in others:
                parameter.requires_grad_(True)

    def _epochs(self) -> None:
        args, accelerator, per_epoch = self.args, self.accelerator, len(self.loader)
        hidden = not accelerator.is_local_main_process
        with logging.tqdm(total=self.total, initial=self.step, desc="training", disable=hidden) as bar:
            for epoch in range(self.step // per_epoch, args.num_train_epochs):
                self.losses = {route: [] for route in self.walks}
                for batch in self._epoch(epoch, self.step - epoch * per_epoch):
                    self._update(batch)
                    self.step += 1
                    bar.update()
                    if self.step % args.logging_steps == 0:
                        recent = {f"loss/{route}": losses[-1] for route, losses in self.losses.items()}
                        bar.set_postfix(loss=f"{sum(recent.values()) / len(recent):.3f}")
                        accelerator.log({"learning_rate": self.schedule.get_last_lr()[0], **recent}, self.step)
                    due = self.step % args.save_steps == 0 if args.save_steps else self.step % per_epoch == 0
                    if due:
                        self._save()

    def _epoch(self, epoch: int, done: int) -> Iterator[Batch]:
        set_seed(self.args.seed + epoch)  # random augmentation is the same for a run that was resumed
        self.loader.set_epoch(epoch)
        for item in self.accelerator.skip_first_batches(self.loader, done) if done else self.loader:
            yield as_batch(item, "train_set")

    def _update(self, batch: Batch) -> None:
        self._check(batch)
        accelerator = self.accelerator
        for route, loss in self._route_losses(batch):
            accelerator.backward(loss)
            self.losses[route].append(loss.item())
            if not math.isfinite(self.losses[route][-1]):
                raise ValueError(
                    f"the loss of route '{route}' is {self.losses[route][-1]} at step {self.step}; lower the learning "
                    "rate. Checkpoints written so far are sound"
                )
        if accelerator.num_processes > 1:
            for parameter in self.parameters.values():
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
        accelerator.unscale_gradients()
        for module in self.modules.values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def _check(self, batch: Batch) -> None:
        self.model.preprocessing.check(batch["pixel_values"])
        labels = batch.get("labels")
        if labels is None and self.args.distillation < 1:
            raise ValueError(
                "train_set has no labels; give some, or set distillation=1.0 to learn from the anchor alone"
            )
        if labels is not None:
            check_labels(labels, self.model.config.num_labels)

    def _route_losses(self, batch: Batch) -> Iterator[tuple[Route, Tensor]]:
        """The loss of each route in turn; what the routes share is computed once, without gradients."""
        images = batch["pixel_values"].to(self.model.dtype)
        walks = dict(self.walks) | (dict([self.teacher]) if self.teacher else {})
        with torch.no_grad(), self.accelerator.autocast():
            starts = self._first_segments(images, walks)
            taught = run_steps(*starts[self.teacher[0]]) if self.teacher else None
        for route in self.walks:
            with self.accelerator.autocast():
                logits = run_steps(*starts[route])
            yield route, self._loss(logits.float(), batch.get("labels"), taught)

    def _first_segments(
        self, images: Tensor, walks: dict[Route, tuple[Step, ...]]
    ) -> dict[Route, tuple[Tensor, tuple[Step, ...]]]:
        """For each route the activation after its first segment, and the steps that are left."""
        found: dict[Route, tuple[Tensor, tuple[Step, ...]]] = {}
        for name in {route.segments[0].anchor for route in walks}:
            mine = {route: steps for route, steps in walks.items() if route.segments[0].anchor == name}
            before = next(iter(mine.values()))
            at = next(index for index, step in enumerate(before) if step.segment is not None)
            stops = {route.segments[0].stop for route in mine}
            features = self.model.anchors[name].capture(run_steps(images, before[:at]), stops)
            found |= {route: (features[route.segments[0].stop], steps[at + 1 :]) for route, steps in mine.items()}
        return found

    def _loss(self, logits: Tensor, labels: Tensor | None, taught: Tensor | None) -> Tensor:
        weight, heat = self.args.distillation, self.args.temperature
        loss = logits.new_zeros(())
        if weight < 1 and labels is not None:
            loss = loss + (1 - weight) * cross_entropy(logits, labels)
        if taught is not None:
            target = softmax(taught.float() / heat, dim=-1)
            loss = loss + weight * heat**2 * kl_div(log_softmax(logits / heat, dim=-1), target, reduction="batchmean")
        return loss

    def _checkpoints(self) -> list[Path]:
        found = Path(self.args.output_dir or ".").glob("checkpoint-*")
        return sorted((p for p in found if p.name[11:].isdecimal()), key=lambda p: int(p.name[11:]))

    def _save(self) -> None:
        """Write what trains, the optimizer's moments and the place in the data; keep the last few."""
        if self.args.output_dir is None or not self.accelerator.is_main_process:
            return
        tensors = {f"parameters/{name}": p.detach().contiguous() for name, p in self.parameters.items()}
        moments = self.optimizer.state_dict()["state"]
        for index, name in enumerate(self.parameters):
            tensors |= {f"{key}/{name}": value.contiguous() for key, value in moments[index].items()}
        with folder_written_whole(Path(self.args.output_dir) / f"checkpoint-{self.step}", PLACE) as folder:
            save_file(tensors, folder / "training.safetensors")
            place = {"step": self.step, "total": self.total, "schedule": self.schedule.state_dict()}
            if self.accelerator.scaler is not None:
                place["scaler"] = self.accelerator.scaler.state_dict()
            (folder / PLACE).write_text(json.dumps(place))
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def _resume(self, folder: Path) -> None:
        place = json.loads((folder / PLACE).read_text())
        with safe_open(folder / "training.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        found = {key.removeprefix("parameters/") for key in tensors if key.startswith("parameters/")}
        if found != set(self.parameters) or place["total"] != self.total:
            raise ValueError(
                f"{folder} is of another training: it has {place['total']} steps over {sorted(found)}, this one "
                f"{self.total} over {sorted(self.parameters)}. Choose another output_dir"
            )
        state = self.optimizer.state_dict()
        keys = {key.split("/")[0] for key in tensors} - {"parameters"}
        with torch.no_grad():
            for index, (name, parameter) in enumerate(self.parameters.items()):
                parameter.copy_(tensors[f"parameters/{name}"])
                state["state"][index] = {key: tensors[f"{key}/{name}"] for key in keys}
        for group, rate in zip(state["param_groups"], place["schedule"]["_last_lr"], strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict(state)
        self.schedule.load_state_dict(place["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(place["scaler"])
        self.step = place["step"]
