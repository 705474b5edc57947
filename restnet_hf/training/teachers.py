"""Teachers: the classifier that routes learn from, why it was chosen, and its logits for the model's classes."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax
from transformers.utils import logging

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.datasets import IGNORED, Batch
from restnet_hf.data.shares import in_order, own_batches
from restnet_hf.distributed import this_process
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.routes.route import Route
from restnet_hf.steps import Step, first_segment, run_steps
from restnet_hf.training.args import AUTO, MEAN, TrainArgs
from restnet_hf.training.outside import OutsideClassifier, load_outside


TEACHER = "teacher"  # beginning of the name of the logits that are distilled
PROBE = 16  # images of noise whose logits identify a classifier from outside
KEPT = 2  # of them, whose logits are kept in a checkpoint
Images = Callable[[], Iterable[Batch]]
"""A function that returns batches of held-out images on the model's device, the same ones at each call."""
logger = logging.get_logger(__name__)


class Teacher:
    """The classifier that routes learn from: one anchor, the mean of several, or a classifier from outside.

    New heads of anchors are copied, so that a teacher stays what it is while heads train.

    Args:
        name: name of an anchor, ``mean``, or the hash of a classifier from outside.
        reason: name and reason of the choice, for people.
        walks: steps of the anchors alone whose logits it takes, by name.
        classifier: classifier from outside; None where it is made of anchors.
        probe: logits (N, classes) of a few images, by which a resumed run knows a classifier from outside.
    """

    def __init__(
        self,
        name: str,
        reason: str,
        walks: Mapping[str, Sequence[Step]] | None = None,
        classifier: OutsideClassifier | None = None,
        probe: Tensor | None = None,
    ) -> None:
        self.name, self.reason, self.classifier, self.probe = name, reason, classifier, probe
        self.walks = {anchor: _with_copies(steps) for anchor, steps in (walks or {}).items()}

    @property
    def anchors(self) -> tuple[str, ...]:
        """Names of the model's anchors whose logits the teacher takes."""
        return tuple(self.walks)

    @property
    def output(self) -> str:
        """Name of the teacher's logits among the outputs of frozen networks."""
        return f"{TEACHER}-{self.name}"

    def finish(self, anchor: str, x: Tensor) -> Tensor:
        """Logits (N, classes) of an anchor from what its network returns: the head or order of classes is applied."""
        steps = self.walks[anchor]
        return run_steps(x, steps[steps.index(first_segment(steps)) + 1 :])

    def combine(self, images: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """The teacher's logits (N, classes) for images whose anchors have run.

        Args:
            images: images (N, 3, H, W) in the model's preprocessing.
            own: logits (N, classes) of each of `anchors`.

        Raises:
            ValueError: logits are not finite, though the images are.
        """
        if self.classifier is not None:
            logits = self.classifier(images)
        else:
            logits = next(iter(own.values())) if len(own) == 1 else mean_logits(own.values())
        if not torch.isfinite(logits).all() and torch.isfinite(images).all():
            rows = int((~torch.isfinite(logits)).any(-1).sum())
            raise ValueError(
                f"teacher {self._title()} returns logits that are not finite (NaN or inf) for {rows} of {len(images)} "
                "images, and nothing can learn from them. Choose another teacher=; a network that overflows in "
                "float16, beyond 65504, runs in dtype='float32' or 'bfloat16'. The model has the weights that it had "
                "before training"
            )
        return logits

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The teacher's logits (N, classes) for images (N, 3, H, W) in the model's preprocessing.

        Raises:
            ValueError: logits are not finite, though the images are.
        """
        return self.combine(images, {name: run_steps(images, steps) for name, steps in self.walks.items()})

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the teacher, fit for JSON."""
        probe = None if self.probe is None else self.probe[:KEPT].tolist()
        return {"name": self.name, "reason": self.reason, "logits": probe}

    def check_state(self, stored: Mapping[str, Any]) -> None:
        """Check that a checkpoint's training had the same teacher.

        A classifier from outside is the same where its logits are, but for the rounding of another machine.

        Args:
            stored: the `state` in the checkpoint.

        Raises:
            ValueError: it had another teacher.
        """
        logits = stored.get("logits")
        same = self.name == stored["name"]
        if not same and self.probe is not None and logits is not None:
            now, then = self.probe[:KEPT], torch.tensor(logits)
            same = now.shape == then.shape and torch.allclose(now, then, rtol=1e-2, atol=1e-2 * float(then.std()))
        if not same:
            raise ValueError(
                f"the checkpoints in output_dir belong to a training with the teacher "
                f"{stored.get('reason', stored['name'])}, and this one has {self.reason}. Give the same teacher=, or "
                "choose another output_dir"
            )

    def _title(self) -> str:
        return f"'{self.name}'" if self.classifier is None else self.classifier.title


def _with_copies(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Steps of an anchor alone, with copies of those after the network, which may train."""
    at = steps.index(first_segment(steps)) + 1
    return (*steps[:at], *(replace(step, module=copy.deepcopy(step.module)) for step in steps[at:]))


def mean_logits(logits: Iterable[Tensor]) -> Tensor:
    """Log of the mean of the probabilities of several classifiers, (N, classes) in float32.

    Args:
        logits: logits (N, classes) of each.
    """
    logs = torch.stack([log_softmax(each.float(), dim=-1) for each in logits])
    return logs.logsumexp(0) - math.log(len(logs))


def needs_teacher(args: TrainArgs) -> bool:
    """Whether a training distils at all."""
    return bool(args.distillation and args.num_train_epochs)


def taught_by(model: StitchedModelForImageClassification, args: TrainArgs) -> list[str]:
    """Names of the anchors that may be the teacher or a part of it, whose new heads must be trained first.

    Args:
        model: model of the routes that train.
        args: options of the training.
    """
    name = _own_name(model, args.teacher) if needs_teacher(args) else None
    return [] if name is None else [*model.anchors] if name in (AUTO, MEAN) else [name]


def _own_name(model: StitchedModelForImageClassification, teacher: Any) -> str | None:
    """``auto``, ``mean`` or the anchor's name that a teacher stands for; None for a classifier from outside.

    Raises:
        ValueError: an anchor has a name that means something else here.
    """
    if isinstance(teacher, str) and teacher == AUTO:
        return AUTO
    name = teacher if isinstance(teacher, str) else None
    for key, anchor in model.anchors.items():
        if teacher is anchor or (not model.heads and _is_copy(teacher, anchor)):
            name = key
    if name in model.anchors and name in (AUTO, MEAN):
        raise ValueError(
            f"teacher={name!r} is the name of an anchor and has a meaning of its own, so it could be either; load the "
            "anchor with another one: load_anchor(..., name=)"
        )
    return name if name in (MEAN, *model.anchors) else None


def _is_copy(teacher: Any, anchor: Anchor) -> bool:
    """Whether a teacher is an anchor's network, alone or as the anchor that the model was made of."""
    if not isinstance(teacher, Anchor):
        return teacher is anchor.model
    same = teacher.preprocessing == anchor.preprocessing and teacher.label_names == anchor.label_names
    return same and teacher.model is anchor.model


def load_teacher(model: StitchedModelForImageClassification, args: TrainArgs) -> TrainArgs:
    """Options whose teacher from outside is loaded and known to have the model's classes, before anything trains.

    Args:
        model: model of the routes that are to train.
        args: options of the training.

    Raises:
        OSError: a folder or Hub id cannot be loaded.
        ValueError: the teacher is no classifier, or lacks classes of the model.
    """
    if not needs_teacher(args) or _own_name(model, args.teacher) or isinstance(args.teacher, OutsideClassifier):
        return args
    return replace(args, teacher=load_outside(model, args.teacher))


def make_teacher(
    model: StitchedModelForImageClassification,
    args: TrainArgs,
    images: Images,
    stored: Mapping[str, Any] | None = None,
    judges: bool = False,
) -> Teacher | None:
    """The teacher that the options ask for; all processes get the same one.

    Args:
        model: model of the routes that learn.
        args: options of the training.
        images: held-out images, for the choice of ``auto`` and to know a classifier from outside again.
        stored: `Teacher.state` in the checkpoint that is resumed from; None for a new training.
        judges: whether a teacher is needed without distillation too, since held-out images have no labels.

    Returns:
        The teacher; None where none is needed.

    Raises:
        OSError: a folder or Hub id cannot be loaded.
        ValueError: the teacher is no classifier, lacks classes of the model, returns logits that are not finite, has a
            new head that is not trained, or is not the checkpoint's.
    """
    if not (needs_teacher(args) or judges):
        return None
    args = load_teacher(model, args)
    name = _own_name(model, args.teacher)
    teacher = _of_anchors(model, name, images, stored) if name else _known_by_logits(args.teacher, images)
    if stored is not None:
        teacher.check_state(stored)
    teacher.name, teacher.reason = _agreed((teacher.name, teacher.reason))
    logger.info(f"teacher: {teacher.reason}")
    return teacher


def _agreed(value: Any) -> Any:
    """The value of the main process."""
    if this_process().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def _of_anchors(
    model: StitchedModelForImageClassification, name: str, images: Images, stored: Mapping[str, Any] | None
) -> Teacher:
    """A teacher made of the model's anchors; for ``auto``, the one that is best or that a checkpoint names."""
    walks = {anchor: model.steps(Route.alone(anchor)) for anchor in model.anchors}
    asked = walks if name in (AUTO, MEAN) else {name: walks[name]}
    untrained = [key for key in asked if model.config.new_head and key not in model.config.trained_heads]
    if untrained:
        raise ValueError(
            f"the new head of '{untrained[0]}' is not trained yet, so there is nothing to distil from it. Call "
            "train_heads first, or set distillation=0"
        )
    if name == MEAN:
        return Teacher(MEAN, f"mean of {', '.join(walks)}", walks)
    reason = name
    if name == AUTO and stored is not None and stored["name"] in walks:
        name, reason = stored["name"], stored.get("reason", stored["name"])
    elif name == AUTO:
        name, reason = _agreed(_best_anchor(walks, images))
    return Teacher(name, reason, {name: walks[name]})


def _best_anchor(walks: Mapping[str, Sequence[Step]], images: Images) -> tuple[str, str]:
    """Name of the best anchor, and the reason.

    Accuracy decides where there are labels, and of equal ones the mean probability of the label. Without labels it is
    the mean confidence, see `confidence`.
    """
    if len(walks) == 1:
        return next(iter(walks)), f"{next(iter(walks))} (the only anchor)"
    logits, labels = _run_all(lambda x: {name: run_steps(x, steps) for name, steps in walks.items()}, images)
    count = len(next(iter(logits.values())))
    if labels is None:
        scores = {name: (confidence(each), 0.0) for name, each in logits.items()}
        what = f"mean confidence on {count} held-out images without labels"
    else:
        scores = {name: score(each, labels) for name, each in logits.items()}
        what = f"of {count} held-out images"
    first, *others = sorted(walks, key=scores.__getitem__, reverse=True)
    rest = "".join(f", {name} {100 * scores[name][0]:.1f} %" for name in others)
    return first, f"{first} ({100 * scores[first][0]:.1f} % {what}{rest})"


@torch.no_grad()
def _run_all(run: Callable[[Tensor], dict[str, Tensor]], images: Images) -> tuple[dict[str, Tensor], Tensor | None]:
    """Logits (images, classes) of all held-out images by name, and their labels; None where there are none.

    Processes share the images. Those whose label is ignored are left out, unless that is so for all.
    """
    chunks = list[tuple[int, dict[str, Tensor], Tensor | None]]()
    for number, _, batch in own_batches(images()):
        logits = {name: each.float().cpu() for name, each in run(batch["pixel_values"]).items()}
        chunks.append((number, logits, batch["labels"].cpu() if "labels" in batch else None))
    chunks = in_order(chunks)
    if not chunks:
        raise ValueError("train_set gives no images")
    logits = {name: torch.cat([each[1][name] for each in chunks]) for name in chunks[0][1]}
    labels = [each[2] for each in chunks if each[2] is not None]
    joined = torch.cat(labels) if labels else torch.empty(0)
    if len(joined) != len(next(iter(logits.values()))):
        return logits, None
    known = joined != IGNORED if joined.dim() == 1 else torch.ones(len(joined), dtype=torch.bool)
    if not known.any():
        return logits, None
    return {name: each[known] for name, each in logits.items()}, joined[known]


def score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean probability of the labels, from 0 to 1; logits that are not finite count as wrong.

    Args:
        logits: logits (N, classes) of a classifier.
        labels: class of each image (N,), or probabilities of its classes (N, classes).
    """
    weights = labels.float() if labels.dim() == 2 else nn.functional.one_hot(labels.long(), logits.shape[1]).float()
    finite = torch.isfinite(logits).all(-1, keepdim=True)
    predicted = logits.nan_to_num().argmax(-1, keepdim=True)
    probabilities = softmax(logits.nan_to_num(), dim=-1)
    right, sure = weights.gather(1, predicted) * finite, (weights * probabilities).sum(-1, keepdim=True) * finite
    return right.mean().item(), sure.mean().item()


def confidence(logits: Tensor) -> float:
    """Mean probability of the most probable class where all classifiers have the same spread of logits, from 0 to 1.

    Without labels no temperature can be calibrated, and networks differ in theirs for reasons that have nothing to do
    with their accuracy. So each one's logits are divided by their own standard deviation over images and classes,
    after the mean of each image, which the probabilities do not depend on, is subtracted. What is left is how far the
    first class stands out from the others, image by image. Images whose logits are not finite count as 0.

    Args:
        logits: logits (N, classes) of a classifier.
    """
    finite = torch.isfinite(logits).all(-1)
    if not finite.any():
        return 0.0
    centred = logits[finite] - logits[finite].mean(-1, keepdim=True)
    scaled = centred / centred.std(correction=0).clamp_min(torch.finfo(centred.dtype).tiny)
    return (softmax(scaled, dim=-1).amax(-1).sum() / len(logits)).item()


def _known_by_logits(classifier: OutsideClassifier, images: Images) -> Teacher:
    """A teacher from outside, whose name is a hash of its logits on noise, the same for any images and seed.

    Raises:
        ValueError: it cannot classify the images, or its logits have another shape or are not finite.
    """
    batch = next(iter(images()), None)
    if batch is None:
        raise ValueError("train_set gives no images")
    first = batch["pixel_values"][:PROBE]
    teacher = Teacher("", classifier.title, classifier=classifier)
    try:
        teacher.logits(first)  # noise alone may not show what it cannot classify
        noise = torch.randn(PROBE, *first.shape[1:], generator=torch.Generator().manual_seed(0))
        probe = teacher.logits(noise.to(first.device, first.dtype)).float().cpu()
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:  # a function may fail in any way
        raise ValueError(
            f"teacher {classifier.title} cannot classify images {tuple(first.shape)}: {error}. It must take images "
            "in the model's preprocessing and return logits (N, classes)"
        ) from error
    teacher.name = hashlib.sha256(probe.contiguous().numpy().tobytes()).hexdigest()[:16]
    teacher.probe = probe
    logits, labels = _run_all(lambda x: {"": teacher.logits(x)}, images)
    if labels is not None:
        accuracy, count = score(logits[""], labels)[0], len(labels)
        teacher.reason = f"{classifier.title} ({100 * accuracy:.1f} % of {count} held-out images)"
    return teacher
