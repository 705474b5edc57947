"""The training loop, under Accelerate: stitches, new heads and tuned weights learn, the anchors do not change."""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, find_executable_batch_size, set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset
from transformers import PreTrainedModel
from transformers.utils import logging

from restnet_hf.data.datasets import MULTI_LABEL, Batch, check_labels, to_batch
from restnet_hf.distributed import Own, add_up, catch_sigterm
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.progress import progress_bar
from restnet_hf.routes.route import Route, Routes
from restnet_hf.training.args import AUTO, RouteScores, TrainArgs, TrainResult
from restnet_hf.training.checkpoints import Checkpoints
from restnet_hf.training.heads import head_args, needed_heads, record_trained, shared_options, untrained_heads
from restnet_hf.training.learner import Learner, check_routes
from restnet_hf.training.loaders import (
    Batches,
    FeatureRows,
    cache_features,
    check_train_set,
    compute_features,
    evaluation_loader,
    first_images,
    is_stream,
    make_loader,
    own_first_images,
)
from restnet_hf.training.losses import count_labels
from restnet_hf.training.outside import ready_teacher
from restnet_hf.training.pace import Pace
from restnet_hf.training.restoring import restored_on_error
from restnet_hf.training.samplers import SAMPLERS, Sampler
from restnet_hf.training.shared_steps import make_steps
from restnet_hf.training.teachers import Teacher, load_teacher, make_teacher
from restnet_hf.training.tracking import trackers
from restnet_hf.training.validation import BestStates, HeldOut, Split, split_held_out


logger = logging.get_logger(__name__)
CALIBRATION_IMAGES = 512  # images for BatchNorm statistics and the scales of features
TEACHER_IMAGES = 300  # of those held out, images that a teacher is chosen by: all anchors run on them


def train(
    model: StitchedModelForImageClassification,
    train_set: Any,
    args: TrainArgs | None = None,
    routes: Routes | None = None,
    *,
    validation: Any = None,
    on_error: str = "raise",
) -> TrainResult:
    """Train the stitches of routes, by default all of them on every batch, and the other parts that ``args`` names.

    Each batch runs once through the front, without gradients, and from each cut on through its stitch and the end.
    Stitches that no other route shares learn as they would alone; routes of a family may share stitches, which learn
    from all of them. The anchors do not change: tuned weights take the place of theirs while a stitched route runs, or
    a tuned anchor, ``tuned a[:]``, which has a head of its own.

    A tenth of the images, at least 100 and at most half of them, is held out, and each route ends with the state that
    scored best on them, which may be the one that it had before. Routes that share weights keep the state with the
    best mean score.

    Args:
        model: model whose stitches train.
        train_set: labelled images, in any form that ``model.prepare_data`` takes.
        args: options of training; the defaults of `TrainArgs` where None.
        routes: one route or several to train; by default those that were added. Of an anchor alone only a new head
            trains, of a tuned one its own head and what ``args.tuning`` names.
        validation: images to score routes on in place of held-out ones, in any form that ``model.prepare_data`` takes.
        on_error: ``raise``, or ``skip`` to leave out broken pictures; see ``model.prepare_data``.

    New heads that training needs, those of teachers and at the end of routes, are trained first as by
    `train_heads`, unless they were. Stitches, heads and tuned weights train in float32 whatever type the anchors have.

    Raises:
        ValueError: nothing would train; labels are missing, out of range or of other classes; or the loss is not
            finite, where checkpoints written before remain valid.
        OSError: a checkpoint or the cache cannot be written, because the disk is full for example.
        SystemExit: the process received SIGTERM; a checkpoint was written, and the exit status is 143.

    After any error, and an interruption, the model has the weights that it had before.
    """
    began, args = time.perf_counter(), args or TrainArgs()
    chosen = check_routes(model, model.routes if routes is None else routes, args)
    if validation is not None and (args.keep == "last" or not args.matching_epochs + args.num_train_epochs):
        raise ValueError(
            f"with keep={args.keep!r} and {args.matching_epochs} + {args.num_train_epochs} epochs no route is scored, "
            "so validation would not be used; leave it out, or train with keep='best'"
        )
    args = load_teacher(model, args)
    train_set = model.prepare_data(train_set, name="train_set", on_error=on_error)
    if validation is not None:
        validation = model.prepare_data(validation, name="validation", on_error=on_error)
    with restored_on_error(model):
        heads = needed_heads(model, chosen, args)
        if heads:
            logger.warning(
                f"the new heads of {[route.head for route in heads]} are trained first, on the frozen anchors; "
                "train_heads does this with options of your own"
            )
            _train(model, train_set, shared_options(args), heads, True, validation, began)
        return _train(model, train_set, args, chosen, validation=validation, began=began)


def train_heads(
    model: StitchedModelForImageClassification,
    train_set: Any,
    args: TrainArgs | None = None,
    *,
    anchors: Iterable[str] | None = None,
    on_error: str = "raise",
) -> TrainResult:
    """Train every new head that was not trained, on its frozen anchor.

    The anchors run once for each image, and the linear heads learn from the features that these give: each image is
    the same in every epoch, also where the data set augments it at random. The features are in memory, or in
    ``cache_dir`` where the options name one. A tenth is held out, and the best heads stay, as in `train`.

    Args:
        model: model of a new task, with new heads.
        train_set: labelled images, in any form that ``model.prepare_data`` takes.
        args: options of training, without those of stitches; by default `HEAD_ARGS`, twenty epochs. Heads learn from
            labels alone, whatever ``distillation`` is.
        anchors: names of the anchors, or keys of the heads, that train; by default all that were not trained.
        on_error: ``raise``, or ``skip`` to leave out broken pictures; see ``model.prepare_data``.

    Returns:
        The number of steps, the seconds, and the mean loss of each anchor alone over the last epoch.

    Raises:
        ValueError: there are no heads to train, an option is only for stitches, or see `train`.
    """
    routes, options = untrained_heads(model, anchors), head_args(args)
    if not routes:
        reason = "all new heads are trained" if model.heads else "the model has the anchors' own heads"
        raise ValueError(f"there are no heads to train: {reason}. train(..., routes=['a[:]']) trains one further")
    train_set = model.prepare_data(train_set, name="train_set", on_error=on_error)
    with restored_on_error(model):
        return _train(model, train_set, options, routes, in_memory=True)


def _train(
    model: StitchedModelForImageClassification,
    train_set: Any,
    args: TrainArgs,
    routes: Sequence[Route],
    in_memory: bool = False,
    validation: Any = None,
    began: float | None = None,
) -> TrainResult:
    """Train routes; see `train`. With ``in_memory``, the outputs of frozen networks are computed once, and kept."""
    check_train_set(train_set, args)
    resumes = _check_output_dir(args)
    began = time.perf_counter() if began is None else began
    accelerator = start_accelerator(model, args)
    if args.matching_epochs + args.num_train_epochs:
        split = Split(train_set, validation)
        if args.keep == "best" and validation is None:
            split = split_held_out(train_set, args)
        with ready_teacher(args.teacher, model.device):
            training = Training(model, split, args, routes, accelerator, resumes, in_memory, began)
            training.run()
        result = training.result()
    else:
        model.fit_stitches(own_first_images(train_set, args.least_squares_images or 0), routes)
        result = TrainResult(0, time.perf_counter() - began, {})
    model.unfitted.difference_update(point.name for route in routes for point in route.stitch_points)
    model.forget_profile()
    return result


def _check_output_dir(args: TrainArgs) -> bool:
    """Whether there are checkpoints to resume from; ValueError where they may not be used."""
    resumes = bool(Checkpoints(args.output_dir).paths())
    if resumes and not args.resume_from_checkpoint:
        raise ValueError(
            f"{args.output_dir} holds checkpoints of an earlier training; go on from them with "
            "resume_from_checkpoint=True, or choose another output_dir"
        )
    return resumes


def start_accelerator(model: StitchedModelForImageClassification, args: TrainArgs) -> Accelerator:
    """Set up Accelerate, set the seed, and move the model to the device.

    Args:
        model: model that is to train.
        args: options of the training.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=trackers(args.log_with, args.output_dir),
        project_dir=args.output_dir,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, non_blocking=True),
    )
    set_seed(args.seed)
    model.to(accelerator.device)  # before the optimizer gets the parameters
    return accelerator


def set_checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    """Turn activation checkpointing on or off, under the name that the installed transformers has for it.

    Args:
        model: model whose modules are checkpointed.
        enabled: whether activations are computed again for the backward pass instead of kept.
    """
    word = "enable" if enabled else "disable"
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{prefix}_checkpointing_{word}")()


class Training:
    """One run of the loop of `train`: learner, loader, sampler, optimizer, and the place in the data.

    Args:
        model: model on the device of ``accelerator``.
        split: images to train on and those held out: map-style data sets, DataLoaders, or data without a length.
        args: options of the training.
        routes: routes that are to train.
        accelerator: Accelerate's state, from `start_accelerator`.
        resumes: whether to go on from the last checkpoint in ``output_dir``.
        in_memory: whether the outputs of frozen networks are computed once for each image and held in memory, unless
            ``args`` has a ``cache_dir``.
        began: value of `time.perf_counter` from which the time counts; by default now.

    Raises:
        ValueError: there is nothing to learn from, or the images cannot be cached.
        OSError: the cache cannot be written.
    """

    def __init__(
        self,
        model: StitchedModelForImageClassification,
        split: Split,
        args: TrainArgs,
        routes: Iterable[Route | str],
        accelerator: Accelerator,
        resumes: bool = False,
        in_memory: bool = False,
        began: float | None = None,
    ) -> None:
        self.model, self.train_set, self.args, self.accelerator = model, split.train, args, accelerator
        self.checkpoints = Checkpoints(args.output_dir)
        self.resumes, self.began = resumes, time.perf_counter() if began is None else began
        self.losses: dict[Route, list[float]] = {}
        self.step = self.epoch = self.done = 0  # steps done, epochs done, and steps done in this epoch
        self.part_size = 0
        self.teacher = self._make_teacher(split)
        calibration = None if self.resumes else self._calibration_images
        self.learner = Learner(model, routes, args, calibration, self.teacher)
        rows, held_out = self._frozen_rows(split, in_memory)
        self.sampler = self._make_sampler()
        optimizer = self._make_optimizer()
        loader, record = make_loader(rows, args), args.output_dir is not None
        self.steps = make_steps(loader, accelerator, self.check_batch, record)
        self.per_epoch = None if is_stream(self.steps.dataset) else len(self.steps)
        epochs = args.matching_epochs + args.num_train_epochs
        self.total = min(count for count in (self.per_epoch and epochs * self.per_epoch, args.max_steps) if count)
        seconds = None if args.max_minutes is None else 60 * args.max_minutes
        self.pace = Pace(self.total, seconds, self.began, args.warmup_ratio, epochs, accelerator)
        self.optimizer, self.schedule = accelerator.prepare(optimizer, LambdaLR(optimizer, self.pace.rate))
        self.best = BestStates({route: self.learner.parts(route) for route in self.learner.routes})
        self.held_out: HeldOut | None = None
        if held_out is not None:
            self.held_out = HeldOut(self.learner, evaluation_loader(held_out, args), self.check_batch, accelerator)
        self.scored_step, self.resumed_progress = -1, 0.0
        self.drawn = set[Route]()  # routes that trained since they were scored

    def _frozen_rows(self, split: Split, in_memory: bool) -> tuple[Any, Any]:
        """The images to train on and those held out, or the outputs of the frozen networks for them."""
        args, frozen = self.args, self.learner.frozen
        if args.cache_dir is not None:
            rows = cache_features(self.model, frozen, split.train if split.whole is None else split.whole, args)
            if split.indices is None:
                return rows, split.held_out
            train, held_out = (Subset(rows, each) for each in split.indices)
            return train, held_out
        if not in_memory:
            return split.train, split.held_out
        return self._in_memory(split.train), None if split.held_out is None else self._in_memory(split.held_out)

    def _in_memory(self, data: Any) -> FeatureRows:
        args = self.args
        if isinstance(data, Batches):
            return compute_features(
                self.model, self.learner.frozen, map(self.check_batch, data), self.accelerator.autocast
            )
        count = (args.max_steps or 1) * args.batch_size if is_stream(data) else sys.maxsize
        own = own_first_images(data, count, args.batch_size, args.dataloader_num_workers)
        images = Own(each._replace(batch=self.check_batch(each.batch)) for each in own)
        return compute_features(self.model, self.learner.frozen, images, self.accelerator.autocast)

    def run(self) -> None:
        """Train all steps, from the last checkpoint on if there is one."""
        with self._tracked(), self.training_mode(), catch_sigterm() as asked:
            if self.resumes:
                self._resume()
            else:
                self._start()
            self._run_epochs(asked)
            self._score()
            self.best.restore()
        if self.args.num_train_epochs:  # matching ends before the head
            record_trained(self.model, self.learner.modules)

    def _start(self) -> None:
        """Fit stitches and statistics before the first step, and score the routes before and after each."""
        self._score()
        if self.args.least_squares_images is not None:
            stitched = [route for route in self.learner.routes if route.stitch_points]
            self.model.fit_stitches(own_first_images(self.train_set, self.args.least_squares_images), stitched)
            self._renew_rates()
            self._score()
        if self.learner.recalibrate(self._calibration_images):
            self._score()

    def _score(self) -> None:
        """Score the routes on the held-out images, keep the best states, and leave routes out that gain no more."""
        if self.held_out is None or self.scored_step == self.step > 0:
            return
        began, left = time.perf_counter(), set(self.sampler.routes)
        routes = [route for route in self.best.routes if route in left]
        scores = self.held_out.scores(routes, not self.args.num_train_epochs)
        self.best.update(scores, self.step, self.epoch + self.done / (self.per_epoch or self.total), self.drawn)
        self.scored_step, self.drawn = self.step, set()
        results = self.best.results(self.held_out.metrics)
        self.accelerator.log({f"held_out/{route}": results[route].last for route in routes}, self.step)
        self._leave_out(self.best.stalled(self.args.early_stopping_patience or sys.maxsize))
        self.pace.evaluated(time.perf_counter() - began)

    def _leave_out(self, routes: set[Route]) -> None:
        left = [route for route in self.sampler.routes if route not in routes]
        if not left:
            self.pace.progress = 1.0
        elif len(left) < len(self.sampler.routes):
            self.sampler = self.sampler.without(routes)

    @property
    def matching(self) -> bool:
        """Whether the next step matches features, and does not learn the task."""
        epochs = self.args.matching_epochs + self.args.num_train_epochs
        return self.pace.progress < self.args.matching_epochs / epochs

    def result(self) -> TrainResult:
        """What `train` returns; adds this training to the model's configuration, for its card."""
        seconds = time.perf_counter() - self.began
        scores = {} if self.held_out is None else self.best.results(self.held_out.metrics)
        images = 0 if self.held_out is None else self.held_out.images
        self.record(seconds, scores, images)
        teacher = None if self.teacher is None else self.teacher.reason
        named = {str(route): each for route, each in scores.items()}
        return TrainResult(self.step, seconds, self.mean_losses(), named, images, teacher)

    def mean_losses(self) -> dict[str, float]:
        """The mean loss of each route over the last epoch."""
        return {str(route): sum(losses) / len(losses) for route, losses in self.losses.items() if losses}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        args = self.args
        rates = self.learner.learning_rates()
        groups: dict[Any, list[nn.Parameter]] = {}
        for parameter, rate in rates.items():  # automatic rates may differ between a run and its resumption
            groups.setdefault(parameter if args.learning_rate == AUTO else rate, []).append(parameter)
        return torch.optim.AdamW(
            [{"params": group, "lr": rates[group[0]]} for group in groups.values()],
            weight_decay=args.weight_decay,
            foreach=True,
        )

    def _renew_rates(self) -> None:
        """Set the learning rates to those of the stitches as they are now, after a fit."""
        rates = self.learner.learning_rates()
        for at, group in enumerate(self.optimizer.param_groups):
            group["initial_lr"] = self.schedule.scheduler.base_lrs[at] = rates[group["params"][0]]
            group["lr"] = group["initial_lr"] * self.pace.rate()

    def _make_teacher(self, split: Split) -> Teacher | None:
        def images() -> Iterator[Batch]:
            device, dtype = self.model.device, self.model.dtype
            data = split.train if split.held_out is None else split.held_out
            some = (
                data
                if isinstance(data, Batches)
                else first_images(data, TEACHER_IMAGES, self.args.batch_size, spread=True)
            )
            for item in some:
                batch = self.check_batch(item)
                yield {**batch, "pixel_values": batch["pixel_values"].to(device, dtype)}

        stored = self.checkpoints.read_place().get("teacher") if self.resumes else None
        with torch.random.fork_rng(devices=()):  # random augmentation is the same for a run that was resumed
            torch.default_generator.manual_seed(self.args.seed)
            return make_teacher(self.model, self.args, images, stored, self._needs_judge(split, images))

    def _needs_judge(self, split: Split, images: Callable[[], Iterator[Batch]]) -> bool:
        """Whether features are matched, and only agreement with a teacher can tell how good routes are."""
        config = self.model.config
        if split.held_out is None or self.args.num_train_epochs:
            return False
        untrained = config.new_head and {*self.model.anchors} - {*config.trained_heads}
        return not untrained and "labels" not in next(images())

    def _calibration_images(self) -> Iterator[Tensor]:
        for batch in first_images(self.train_set, CALIBRATION_IMAGES, self.args.batch_size):
            yield self.check_batch(batch)["pixel_values"].to(self.model.device, self.model.dtype)

    def _make_sampler(self) -> Sampler:
        kind = SAMPLERS[self.args.sampler]
        cost = self.model.route_costs() if self.args.sampler != "all" else None
        routes = self.learner.routes
        return kind(routes, {r: cost(r)["macs"] if cost else 0.0 for r in routes}, self.args.seed)

    def record(self, seconds: float, scores: Mapping[Route, RouteScores], held_out: int) -> None:
        """Add this training to the model's configuration, for its card.

        Args:
            seconds: seconds that training took.
            scores: scores of routes on held-out images.
            held_out: number of held-out images.
        """
        images = None if is_stream(self.steps.dataset) else len(self.steps.dataset)
        stage = "heads" if all(route.is_anchor for route in self.learner.routes) else "training"
        done: dict[str, Any] = {"images": images, "routes": len(self.learner.routes), "steps": self.step}
        if scores:
            done |= {"held_out_images": held_out, "scores": {str(r): asdict(each) for r, each in scores.items()}}
        done |= {} if self.teacher is None else {"teacher": self.teacher.reason}
        processes = {"processes": self.accelerator.num_processes, "seconds": round(seconds, 1)}
        self.model.config.training = [
            *self.model.config.training,
            {"stage": stage, **done, **self.args.settings(), **processes},
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
    def training_mode(self) -> Iterator[None]:
        """Put the model in training mode within the block, without gradients for weights that do not train."""
        trained = set(self.learner.parameters.values())
        others = [p for p in self.model.parameters() if p.requires_grad and p not in trained]
        for parameter in others:
            parameter.requires_grad_(False)
        self.model.train()
        if self.args.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer.zero_grad()
        before = all(anchor.gradient_checkpointing for anchor in self.model.anchors.values())
        checkpoints = self.args.activation_checkpointing and not before
        if checkpoints:
            set_checkpointing(self.model, True)
        try:
            yield
        finally:
            self.optimizer.zero_grad()
            if checkpoints:
                set_checkpointing(self.model, False)
            if self.args.channels_last:
                self.model.to(memory_format=torch.contiguous_format)
            self.model.eval()
            for parameter in others:
                parameter.requires_grad_(True)

    def _run_epochs(self, asked: Callable[[], bool]) -> None:
        self.pace.begin(self.step, self.resumed_progress)
        with progress_bar(desc="training", total=self.total, initial=self.step) as bar:
            while not self.pace.over:
                self.losses |= {route: [] for route in self.sampler.routes}  # of those that left, the last ones stay
                for batch, counts in self.epoch_batches():
                    self._do_step(batch, counts, bar)
                    stop = asked()
                    ended = self.pace.over or self.done == self.per_epoch
                    every = self.args.save_steps
                    if stop or (self.step % every == 0 if every else ended):
                        self._save()
                    if stop:
                        raise SystemExit(128 + signal.SIGTERM)
                    if self.pace.over:
                        return
                if not self.done:
                    raise ValueError("train_set gives no images")
                self.epoch, self.done = self.epoch + 1, 0

    def _do_step(self, batch: Batch, counts: bool, bar: Any) -> None:
        due = self.pace.evaluation_number
        self.update(batch, counts)
        self.step += 1
        self.done += 1
        bar.update()
        if self.step % self.args.logging_steps == 0:
            self._log(bar)
        every = self.args.eval_steps
        if self.pace.over or (self.step % every == 0 if every else self.pace.evaluation_number > due):
            self._score()

    def epoch_batches(self) -> Iterator[tuple[Batch, bool]]:
        """The remaining batches of this epoch, each with whether its images count; see `OwnPart`."""
        set_seed(self.args.seed + self.epoch)  # random augmentation is the same for a run that was resumed
        yield from self.steps.epoch(self.epoch, self.done)

    def check_batch(self, item: Any) -> Batch:
        """An item of the loader as a batch, after a check of its images and labels.

        Args:
            item: a batch of images and labels in any form of `to_batch`, or of cached features.

        Raises:
            ValueError: labels are missing, or images or labels do not fit the model.
        """
        if isinstance(item, Mapping) and not {"pixel_values"} & item.keys():
            return dict(item)  # from the cache
        batch = to_batch(item, "train_set")
        self.model.preprocessing.check(batch["pixel_values"])
        labels = batch.get("labels")
        if labels is None and self.args.distillation < 1 and self.args.num_train_epochs:
            raise ValueError(
                "train_set has no labels; give some, or set distillation=1.0 to learn from the anchor alone, or "
                "num_train_epochs=0 and matching_epochs to match its features"
            )
        if labels is not None and (labels.dim() < 2 or self.model.config.problem_type == MULTI_LABEL):
            check_labels(labels, self.model.config.num_labels)  # labels of two dimensions are probabilities of classes
        return batch

    def update(self, batch: Batch, counts: bool = True) -> None:
        """Do one step of the optimizer on the routes that the sampler draws.

        The gradient is that of the mean loss over the images of all processes.

        Args:
            batch: a batch that `check_batch` returned, of this process.
            counts: whether its images count.

        Raises:
            ValueError: a loss is not finite.
        """
        accelerator, drawn = self.accelerator, self.sampler.draw(self.step)
        self.drawn.update(drawn)
        losses = self._backward(batch, drawn, *self._share_of(batch, counts))
        if accelerator.num_processes > 1:
            losses = accelerator.reduce(losses, "sum")
            self._reduce_gradients()
        accelerator.unscale_gradients()
        if type(self.sampler).update is not Sampler.update:
            saliency = {route: self.learner.saliency(route) for route in drawn}
            if all(map(math.isfinite, saliency.values())):  # where float16 overflows, the step is skipped too
                self.sampler.update(saliency)
        for module in self.learner.modules.values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        torch.clear_autocast_cache()  # else an autocast around all of the training would go on with the first weights
        self.pace.update(self.step + 1)  # the rate of the next step
        self.schedule.step()
        self.optimizer.zero_grad()
        self._record(drawn, losses)  # waits for an accelerator, which has the whole step to do by now

    def _record(self, drawn: Sequence[Route], losses: Tensor) -> None:
        """Record the losses of a step; raises ValueError where one is not finite."""
        for route, loss in zip(drawn, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of route '{route}' is {loss} at step {self.step}; {self._cause()}. The model has the "
                    "weights that it had before training, and checkpoints written so far are valid"
                )
            self.losses[route].append(loss)

    def _cause(self) -> str:
        """What to do about a loss that is not finite."""
        if self.model.dtype == torch.float16:
            return (
                "the anchors compute in float16, which overflows beyond 65504: load the model with dtype='float32' or "
                "'bfloat16'"
            )
        return "lower the learning rate"

    def _share_of(self, batch: Batch, counts: bool) -> tuple[Tensor | float, Tensor | None]:
        """The share of this process in the images of a step, and the share of the step's labels that goes with it."""
        labels, size = batch.get("labels"), len(next(iter(batch.values())))
        labelled = None if labels is None or labels.dim() > 1 else count_labels(labels)
        if self.accelerator.num_processes == 1:
            return 1.0, None if labelled is None else labelled.clamp_min(1)
        known = torch.tensor([size, 0.0], device=self.accelerator.device)
        if labelled is not None:
            known[1] = labelled
        every = add_up(known * counts)
        share = known[0] / every[0]
        return share * counts, None if labelled is None else every[1].clamp_min(1) * share  # never divide by 0

    def _backward(
        self, batch: Batch, drawn: Sequence[Route], share: Tensor | float, labelled: Tensor | None
    ) -> Tensor:
        """Compute the gradients of the mean loss of each route over a batch, times the share; returns these losses."""
        size, rest = len(next(iter(batch.values()))), (batch, drawn, share, labelled)
        if not self.args.auto_find_batch_size:
            return self._backward_in_parts(math.ceil(size / self.args.gradient_accumulation_steps), *rest)
        part = self.part_size or math.ceil(size / self.args.gradient_accumulation_steps)
        return find_executable_batch_size(self._backward_in_parts, starting_batch_size=part)(*rest)

    def _backward_in_parts(
        self, batch_size: int, batch: Batch, drawn: Sequence[Route], share: Tensor | float, labelled: Tensor | None
    ) -> Tensor:
        self.part_size = batch_size
        self.optimizer.zero_grad()
        size = len(next(iter(batch.values())))
        options = self.matching, self.sampler.in_place, self.accelerator.autocast
        sums = torch.zeros(len(drawn), device=self.accelerator.device)
        for start in range(0, size, batch_size):
            part = {name: values[start : start + batch_size] for name, values in batch.items()}
            of_part = len(next(iter(part.values()))) / size
            labels, weight = None if labelled is None else labelled * of_part, of_part * share
            for index, loss in enumerate(self.learner.losses(part, drawn, *options, labels)):
                self.accelerator.backward(loss * weight)
                sums[index] += loss.detach() * weight
        return sums

    def _reduce_gradients(self) -> None:
        """Add up the gradients of all processes, in one exchange."""
        gradients = [p.grad for p in self.learner.parameters.values() if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def _log(self, bar: Any) -> None:
        recent = {f"loss/{route}": losses[-1] for route, losses in self.losses.items() if losses}
        importance = {f"importance/{route}": score for route, score in self.sampler.scores.items()}
        bar.set_postfix(loss=f"{sum(recent.values()) / len(recent):.3f}")
        rate = {"learning_rate": self.schedule.get_last_lr()[0]}
        self.accelerator.log({**rate, **recent, **importance}, self.step)

    def _save(self) -> None:
        seconds = self.pace.elapsed()  # of all processes together
        if not self.accelerator.is_main_process:
            return
        place = {"total": self.total, "epoch": self.epoch, "done": self.done, "scales": self.learner.scales}
        place |= {"schedule": self.schedule.state_dict(), "sampler": self.sampler.state_dict()}
        place |= {"best": self.best.state_dict(), "scored_step": self.scored_step, "seconds": seconds}
        place |= {"keep": self.args.keep, "progress": self.pace.progress, "drawn": [*map(str, self.drawn)]}
        place |= {"left": [*map(str, self.sampler.routes)]}
        place |= {"metrics": {} if self.held_out is None else [*self.held_out.metrics.values()]}
        place |= {"teacher": self.teacher and self.teacher.state(), "stream": self.steps.place()}
        if self.accelerator.scaler is not None:
            place["scaler"] = self.accelerator.scaler.state_dict()
        learner = self.learner
        self.checkpoints.save(
            self.step, learner.parameters, self.optimizer, place, learner.buffers, self.best.tensors()
        )

    def _resume(self) -> None:
        learner = self.learner
        kept = self.checkpoints.read_place().get("keep", "last")  # as before there were best states
        if kept != self.args.keep:
            raise ValueError(
                f"the checkpoints in {self.args.output_dir} belong to a training with keep={kept!r}, not "
                f"{self.args.keep!r}; give the same, or choose another output_dir"
            )
        place, best = self.checkpoints.load(self.total, learner.parameters, self.optimizer, learner.buffers)
        self.schedule.load_state_dict(place["schedule"])
        if self.held_out is not None:
            self.best.load_state_dict(place["best"], best)
            self.held_out.metrics = dict(zip(self.best.routes, place["metrics"], strict=True))
        left = set(place.get("left", map(str, self.sampler.routes)))
        self.sampler = self.sampler.without({route for route in self.sampler.routes if str(route) not in left})
        self.sampler.load_state_dict(place["sampler"])
        self.scored_step, self.pace.before = place.get("scored_step", -1), place.get("seconds", 0.0)
        self.drawn = {route for route in self.learner.routes if str(route) in place.get("drawn", ())}
        self.resumed_progress = place.get("progress", 0.0)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(place["scaler"])
        learner.scales = place["scales"]
        self.step, self.epoch, self.done = (place[key] for key in ("step", "epoch", "done"))
        self.steps.resume(place.get("stream"))
        if self.done == self.per_epoch:
            self.epoch, self.done = self.epoch + 1, 0
