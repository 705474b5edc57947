"""The one training loop: stitches, new heads and what is tuned learn, the anchors do not; runs under Accelerate."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, find_executable_batch_size, set_seed
from torch import Tensor, nn
from transformers.utils import logging

from restnet_hf.data.datasets import MULTI_LABEL, Batch, as_batch, check_classes, check_labels
from restnet_hf.distributed import told_to_stop
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.routes.route import Route
from restnet_hf.training.args import TrainArgs, TrainResult
from restnet_hf.training.checkpoints import Checkpoints
from restnet_hf.training.learner import Learner
from restnet_hf.training.loaders import SeededItems, feed, first_images, keep, streams
from restnet_hf.training.samplers import SAMPLERS, Sampler
from restnet_hf.training.tracking import trackers


LOOKED_AT = 512  # images for BatchNorm statistics and the scales of features


def train(
    model: StitchedModelForImageClassification,
    train_set: Any,
    args: TrainArgs | None = None,
    routes: Iterable[Route | str] | None = None,
) -> TrainResult:
    """Train the stitches of routes, by default all of them on every batch, and what else ``args`` asks for.

    Each batch runs once through the front, without gradients, and from each cut on through its stitch and the end.
    Stitches do not share weights, so each learns as it would alone. The anchors do not change: what is tuned of them
    stands in their place while a stitched route runs.

    Args:
        model: with stitches.
        train_set: a map-style dataset, a DataLoader, or data that streams, of ``pixel_values`` and ``labels``.
        args: options.
        routes: which to train; the stitched ones by default. Anchors alone have only a new head to train.

    Raises:
        ValueError: nothing would train, labels are missing, out of range or of other classes, or the loss is not
            finite; checkpoints written before that are sound.
        OSError: a checkpoint or the cache cannot be written, for a full disk say.
        SystemExit: SIGTERM came; a checkpoint of that moment was written, and the exit status is 143.
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
        self.model, self.args, self.train_set = model, args, train_set
        self.learner = Learner(model, model.routes if routes is None else routes, args)
        self.loader: Any = feed(train_set, args)  # before anything is done, so that bad data fail at once
        check_classes(train_set, model.config.id2label)
        self.checkpoints = Checkpoints(args.output_dir)
        self.resumes = bool(self.checkpoints.found())
        if self.resumes and not args.resume_from_checkpoint:
            raise ValueError(
                f"{args.output_dir} holds checkpoints of an earlier training; go on from them with "
                "resume_from_checkpoint=True, or choose another output_dir"
            )
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=trackers(args.log_with, args.output_dir),
            project_dir=args.output_dir,
            dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
        )
        set_seed(args.seed)
        model.to(self.accelerator.device)  # before the optimizer sees the parameters
        self.losses: dict[Route, list[float]] = {}
        self.step = self.epoch = self.done = 0  # of all steps, epochs, and steps of the epoch
        self.part_size = 0

    def run(self) -> TrainResult:
        args = self.args
        began = time.perf_counter()
        if args.least_squares_images is not None and not self.resumes:
            self.model.fit_stitches(first_images(self.train_set, args.least_squares_images), self.learner.routes)
        if args.matching_epochs + args.num_train_epochs:
            self._prepare()
            with self._tracked(), self._only_these_train(), told_to_stop() as asked:
                self._epochs(asked)
            trained = {key.removeprefix("heads.") for key in self.learner.modules if key.startswith("heads.")}
            self.model.config.trained_heads = sorted(trained.union(self.model.config.trained_heads))
            self._record(time.perf_counter() - began)
        self.model.profiled = None  # it was of the stitches as they were
        means = {str(route): sum(losses) / len(losses) for route, losses in self.losses.items() if losses}
        return TrainResult(self.step, time.perf_counter() - began, means)

    def _prepare(self) -> None:
        """All that the loop needs, in the order in which one part needs another."""
        from transformers import get_cosine_schedule_with_warmup  # brings PEFT, which takes a second and more

        args, learner = self.args, self.learner
        fresh = learner.begin()
        if not self.resumes:
            learner.look(self._few_images, fresh)
        if args.cache_dir is not None:
            self.loader = feed(keep(self.model, learner.frozen, self.train_set, args), args)
        self.sampler = self._sampler()
        inside = args.anchor_learning_rate or args.learning_rate * (0.1 if args.tuning == "full" else 1)
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in learner.parameters.items():
            groups.setdefault(inside if name.startswith("tuned.") else args.learning_rate, []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rate} for rate, group in groups.items()],
            weight_decay=args.weight_decay,
            foreach=True,
        )
        self.loader = self.accelerator.prepare(self.loader)
        self.per_epoch = None if streams(self.loader) else len(self.loader)
        epochs = args.matching_epochs + args.num_train_epochs
        steps = [count for count in (self.per_epoch and epochs * self.per_epoch, args.max_steps) if count]
        self.total = min(steps)
        schedule = get_cosine_schedule_with_warmup(optimizer, int(args.warmup_ratio * self.total), self.total)
        self.optimizer, self.schedule = self.accelerator.prepare(optimizer, schedule)

    def _few_images(self) -> Iterator[Tensor]:
        for batch in first_images(self.train_set, LOOKED_AT, self.args.batch_size):
            yield self._checked(batch)["pixel_values"].to(self.model.device, self.model.dtype)

    def _sampler(self) -> Sampler:
        kind = SAMPLERS[self.args.sampler]
        cost = self.model.route_costs() if self.args.sampler != "all" else None
        routes = self.learner.routes
        return kind(routes, {r: cost(r)["macs"] if cost else 0.0 for r in routes}, self.args.seed)

    def _record(self, seconds: float) -> None:
        """Write into config.json, for the card, how it was trained."""
        images = None if streams(self.loader) else len(self.loader.dataset)
        done = {"images": images, "routes": len(self.learner.routes), "steps": self.step}
        processes = {"processes": self.accelerator.num_processes, "seconds": round(seconds, 1)}
        self.model.config.training = [
            *self.model.config.training,
            {"stage": "training", **done, **self.args.settings(), **processes},
        ]

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        if self.accelerator.log_with:
            settings = {key: value for key, value in vars(self.args).items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers("restnet_hf", config=settings)
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:  # end_training() would also end the process group
                tracker.finish()

    @contextmanager
    def _only_these_train(self) -> Iterator[None]:
        """Training mode, and no gradients for stitches and heads that take no part; as before afterwards."""
        mine = set(self.learner.parameters.values())
        others = [p for p in self.model.parameters() if p.requires_grad and p not in mine]
        for parameter in others:
            parameter.requires_grad_(False)
        self.model.train()
        if self.args.channels_last:
            self.model.to(memory_format=torch.channels_last)
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
            if self.args.channels_last:
                self.model.to(memory_format=torch.contiguous_format)
            self.model.eval()
            for parameter in others:
                parameter.requires_grad_(True)

    def _epochs(self, asked: Callable[[], bool]) -> None:
        args, accelerator = self.args, self.accelerator
        if self.resumes:
            self._resume()
        hidden = not accelerator.is_local_main_process
        with logging.tqdm(total=self.total, initial=self.step, desc="training", disable=hidden) as bar:
            while self.step < self.total:
                self.losses = {route: [] for route in self.learner.routes}
                for batch in self._epoch():
                    self._update(batch)
                    self.step += 1
                    self.done += 1
                    bar.update()
                    if self.step % args.logging_steps == 0:
                        self._log(bar)
                    over = self.step >= self.total or self.done == self.per_epoch
                    stop = asked()
                    if stop or (self.step % args.save_steps == 0 if args.save_steps else over):
                        self._save()
                    if stop:
                        raise SystemExit(128 + signal.SIGTERM)
                    if self.step >= self.total:
                        return
                if not self.done:
                    raise ValueError("train_set gives no images")
                self.epoch, self.done = self.epoch + 1, 0

    def _epoch(self) -> Iterator[Batch]:
        set_seed(self.args.seed + self.epoch)  # random augmentation is the same for a run that was resumed
        if isinstance(self.loader.dataset, SeededItems):
            self.loader.dataset.epoch = self.epoch
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(self.epoch)
        for item in self.accelerator.skip_first_batches(self.loader, self.done) if self.done else self.loader:
            yield self._checked(item)

    def _checked(self, item: Any) -> Batch:
        if isinstance(item, Mapping) and not {"pixel_values"} & item.keys():
            return dict(item)  # from the cache
        batch = as_batch(item, "train_set")
        self.model.preprocessing.check(batch["pixel_values"])
        labels = batch.get("labels")
        if labels is None and self.args.distillation < 1 and self.args.num_train_epochs:
            raise ValueError(
                "train_set has no labels; give some, or set distillation=1.0 to learn from the anchor alone, or "
                "num_train_epochs=0 and matching_epochs to match its features"
            )
        if labels is not None and (labels.dim() < 2 or self.model.config.problem_type == MULTI_LABEL):
            check_labels(labels, self.model.config.num_labels)  # of two dimensions they are probabilities of classes
        return batch

    def _update(self, batch: Batch) -> None:
        """One step of the optimizer on the routes that the sampler draws."""
        accelerator, drawn = self.accelerator, self.sampler.draw(self.step)
        found = self._backward(batch, drawn)
        if accelerator.num_processes > 1:
            found = accelerator.reduce(found, "mean")
            self._reduce_gradients()
        for route, loss in zip(drawn, found.tolist(), strict=True):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of route '{route}' is {loss} at step {self.step}; lower the learning rate. Checkpoints "
                    "written so far are sound"
                )
            self.losses[route].append(loss)
        accelerator.unscale_gradients()
        if type(self.sampler).update is not Sampler.update:
            saliency = {route: self.learner.saliency(route) for route in drawn}
            if all(map(math.isfinite, saliency.values())):  # where float16 overflows, the step is not made either
                self.sampler.update(saliency)
        for module in self.learner.modules.values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def _backward(self, batch: Batch, drawn: Sequence[Route]) -> Tensor:
        """Gradients of the mean loss of each route over a batch; returns these losses."""
        size = len(next(iter(batch.values())))
        if not self.args.auto_find_batch_size:
            return self._in_parts(math.ceil(size / self.args.gradient_accumulation_steps), batch, drawn)
        part = self.part_size or math.ceil(size / self.args.gradient_accumulation_steps)
        return find_executable_batch_size(self._in_parts, starting_batch_size=part)(batch, drawn)

    def _in_parts(self, batch_size: int, batch: Batch, drawn: Sequence[Route]) -> Tensor:
        self.part_size = batch_size
        self.optimizer.zero_grad()
        size = len(next(iter(batch.values())))
        matching = self.step < self.args.matching_epochs * (self.per_epoch or self.total)
        options = matching, self.sampler.in_place, self.accelerator.autocast
        sums = torch.zeros(len(drawn), device=self.accelerator.device)
        for start in range(0, size, batch_size):
            part = {name: values[start : start + batch_size] for name, values in batch.items()}
            share = len(next(iter(part.values()))) / size
            for index, loss in enumerate(self.learner.losses(part, drawn, *options)):
                self.accelerator.backward(loss * share)
                sums[index] += loss.detach() * share
        return sums

    def _reduce_gradients(self) -> None:
        """The mean of the gradients over all processes, in one exchange."""
        gradients = [p.grad for p in self.learner.parameters.values() if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _log(self, bar: Any) -> None:
        recent = {f"loss/{route}": losses[-1] for route, losses in self.losses.items() if losses}
        importance = {f"importance/{route}": score for route, score in self.sampler.scores.items()}
        bar.set_postfix(loss=f"{sum(recent.values()) / len(recent):.3f}")
        rate = {"learning_rate": self.schedule.get_last_lr()[0]}
        self.accelerator.log({**rate, **recent, **importance}, self.step)

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        place = {"total": self.total, "epoch": self.epoch, "done": self.done, "scales": self.learner.scales}
        place |= {"schedule": self.schedule.state_dict(), "sampler": self.sampler.state_dict()}
        if self.accelerator.scaler is not None:
            place["scaler"] = self.accelerator.scaler.state_dict()
        learner = self.learner
        self.checkpoints.save(self.step, learner.parameters, self.optimizer, place, learner.buffers)

    def _resume(self) -> None:
        learner = self.learner
        place = self.checkpoints.load(self.total, learner.parameters, self.optimizer, learner.buffers)
        self.schedule.load_state_dict(place["schedule"])
        self.sampler.load_state_dict(place["sampler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(place["scaler"])
        learner.scales = place["scales"]
        self.step, self.epoch, self.done = (place[key] for key in ("step", "epoch", "done"))
        if self.done == self.per_epoch:
            self.epoch, self.done = self.epoch + 1, 0
