"""TrainArgs and TrainResult: options and result of training."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainValidator, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from restnet_hf.errors import quote
from restnet_hf.stitches.tuning import MAX_RANK
from restnet_hf.training.samplers import SAMPLERS


AUTO: Literal["auto"] = "auto"  # teacher: the best anchor on held-out images; learning rate: by size of the weights
MEAN = "mean"  # teacher: the mean of the anchors
NOT_SETTINGS = {  # options that do not change the trained weights
    "output_dir",
    "save_steps",
    "resume_from_checkpoint",
    "logging_steps",
    "log_with",
    "cache_dir",
    "dataloader_num_workers",
}


def _valid_rate(value: Any) -> float | str:
    if value == AUTO:
        return AUTO
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise PydanticCustomError("learning_rate", "Input should be a number above 0, or 'auto'")
    return float(value)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainArgs:
    """Options of `train`; names as in ``transformers.TrainingArguments`` and PEFT where they have them.

    Args:
        output_dir: folder of checkpoints and the log; None writes neither.
        least_squares_images: number of images on which stitches are first fitted by least squares; needs no labels.
        matching_epochs: number of passes over the data in which each route's features then learn to match those of the
            end anchor itself on the same image; needs no labels (arXiv 2603.12433).
        match: features to match: ``final`` the input of the end's classifier, ``later`` all of the end's later cuts
            too (arXiv 2505.20142), ``stitch`` the activations that each stitch of a route replaces, on the route's own
            path (AdaptiveNet, arXiv 2303.07129).
        num_train_epochs: number of passes over the data that follow, with labels, distillation or both.
        max_steps: largest number of steps of both stages together; needed for data without a length.
        max_minutes: largest number of minutes, least squares and caching included; the learning rate falls to zero by
            then, if this comes before the last step.
        keep: which state of each route stays: ``best`` the one with the best score on held-out images, that before
            training included, or ``last``, which holds out no images.
        eval_steps: steps between scores on held-out images; by default four in all, or one in each epoch.
        early_stopping_patience: number of scores in a row without a gain after which a route leaves the training, and
            its time goes to the others; None to train all to the end.
        batch_size: number of images in a step, over all processes.
        gradient_accumulation_steps: number of parts that a step's images run in, to save memory; the result is equal.
        auto_find_batch_size: whether a step's images run in smaller parts where memory runs out.
        learning_rate: highest learning rate, after the warm-up; it falls to zero as a cosine. ``auto`` is a rate for
            each weight of a stitch, in proportion to its size over the square root of the number of its inputs, 1e-3
            for other parameters, and 1e-4 for branches; see `restnet_hf.stitches.rates`.
        weight_decay: weight decay of AdamW.
        warmup_ratio: share of the steps in which the learning rate rises.
        max_grad_norm: norm to which the gradient of each stitch and head is clipped.
        distillation: weight of the distillation from a teacher; the rest is cross-entropy. 1 needs no labels.
        teacher: classifier that is distilled. ``auto`` is the anchor that is most accurate on held-out images, without
            labels the most confident one; ``mean`` the mean of the anchors' probabilities. Others are the name of an
            anchor, a folder or Hub id, an anchor of `load_anchor`, a module, or a function of images (N, 3, H, W) in
            the model's preprocessing that returns logits (N, classes). New heads of anchors that teach are trained
            first, as by `train_heads`.
        temperature: temperature of the distillation (Hinton et al., arXiv 1503.02531).
        train_head: whether the new heads that routes share train too; None trains them if the model has any. The own
            head of a tuned anchor always trains.
        tuning: weights that train besides stitches, and heads of tuned anchors: ``stitch`` none; ``norm`` each route's
            own copy of the affine parameters of the end's norms, with BatchNorm statistics that correct for the
            stitch; ``lora`` low-rank updates of both anchors that all routes share, with biases of the end for each
            route (ESTA, arXiv 2311.17352); ``full`` copies of all weights that all routes share (SN-Net, arXiv
            2302.06586). The anchors themselves never change.
        anchor_learning_rate: learning rate of the weights that train inside anchors; by default ``learning_rate``, or
            1e-3 where that is ``auto``, and a tenth of it for ``full``.
        r: rank of the low-rank updates.
        lora_alpha: scale of the low-rank updates.
        sampler: key of `SAMPLERS`, which draws the routes of each step.
        cache_dir: folder in which the outputs of frozen networks for each image are cached, so that these run once;
            and the images, where a tuned anchor trains from the first block on.
        cache_dtype: type of cached activations; ``int8`` takes half the space of the others, with a scale for each
            channel of a map (C, H, W), each token of an image, or each line of a map (H, W, C).
        save_steps: steps between checkpoints; None for one at the end of each epoch.
        resume_from_checkpoint: whether to go on from the last checkpoint in ``output_dir``, if there is one.
        logging_steps: steps between entries for the trackers.
        log_with: trackers, as in ``Accelerator``; by default ``log.jsonl`` in ``output_dir``.
        mixed_precision: precision of computation, as in ``Accelerator``.
        channels_last: whether convolutions run on maps in the memory format ``channels_last``.
        torch_compile: whether the ends of routes are compiled, where nothing in them trains.
        torch_compile_backend: backend that ``torch.compile`` uses.
        activation_checkpointing: whether only activations at cuts are stored, and the others computed again in the
            backward pass.
        dataloader_num_workers: number of worker processes, as in ``DataLoader``.
        seed: seed of the order of the data and of the sampler.
    """

    output_dir: str | None = None
    least_squares_images: int | None = Field(default=None, gt=0)
    matching_epochs: int = Field(default=0, ge=0)
    match: Literal["final", "later", "stitch"] = "final"
    num_train_epochs: int = Field(default=3, ge=0)
    max_steps: int | None = Field(default=None, gt=0)
    max_minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    keep: Literal["best", "last"] = "best"
    eval_steps: int | None = Field(default=None, gt=0)
    early_stopping_patience: int | None = Field(default=5, gt=0)
    batch_size: int = Field(default=64, gt=0)
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    auto_find_batch_size: bool = False
    learning_rate: Annotated[float | Literal["auto"], PlainValidator(_valid_rate)] = AUTO
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    distillation: float = Field(default=0.5, ge=0, le=1)
    teacher: Any = AUTO
    temperature: float = Field(default=2.0, gt=0)
    train_head: bool | None = None
    tuning: Literal["stitch", "norm", "lora", "full"] = "stitch"
    anchor_learning_rate: float | None = Field(default=None, gt=0)
    r: int = Field(default=8, gt=0, le=MAX_RANK)
    lora_alpha: float = Field(default=8.0, gt=0, allow_inf_nan=False)
    sampler: str = "all"
    cache_dir: str | None = None
    cache_dtype: Literal["float16", "bfloat16", "int8"] = "float16"
    save_steps: int | None = Field(default=None, gt=0)
    resume_from_checkpoint: bool = False
    logging_steps: int = Field(default=10, gt=0)
    log_with: Any = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    channels_last: bool = False
    torch_compile: bool = False
    torch_compile_backend: str = "inductor"
    activation_checkpointing: bool = False
    dataloader_num_workers: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainArgs":
        if self.output_dir is None and (self.resume_from_checkpoint or self.save_steps is not None):
            raise ValueError(
                f"resume_from_checkpoint={self.resume_from_checkpoint} and save_steps={self.save_steps} are about "
                "checkpoints, which need a folder: give output_dir"
            )
        self._check_teacher()
        if self.eval_steps is not None and self.keep == "last":
            raise ValueError("eval_steps scores routes, and keep='last' scores none: leave one of them out")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} is not one of {sorted(SAMPLERS)}")
        if self.cache_dir is not None and self.tuning in ("lora", "full"):
            raise ValueError(f"tuning={self.tuning!r} changes the front at every step, so cache_dir cannot hold it")
        if self.torch_compile and self.tuning != "stitch":
            raise ValueError("torch_compile needs ends in which nothing trains: tuning='stitch'")
        if self.max_minutes is not None and not self.matching_epochs + self.num_train_epochs:
            raise ValueError("max_minutes limits epochs, and there are none: leave it out, or set num_train_epochs")
        if self.least_squares_images is None and not self.matching_epochs + self.num_train_epochs:
            raise ValueError(
                "there is nothing to do: least_squares_images, matching_epochs and num_train_epochs are all off"
            )
        return self

    def _check_teacher(self) -> None:
        teacher = self.teacher
        if isinstance(teacher, str) and teacher == AUTO:
            return
        if isinstance(teacher, type) or not (isinstance(teacher, str | os.PathLike) or callable(teacher)):
            raise ValueError(
                f"teacher={quote(teacher)} is no classifier: give 'auto', 'mean', the name of an anchor, a folder or "
                "Hub id, a module, or a function of images that returns logits"
            )
        if not (self.distillation and self.num_train_epochs):
            raise ValueError(
                f"teacher={quote(teacher)} teaches nothing with distillation={self.distillation} and num_train_epochs="
                f"{self.num_train_epochs}: both must be above 0, or leave teacher out"
            )

    def settings(self) -> dict[str, Any]:
        """The options that a model card should show; the teacher is recorded by its name."""
        return {key: value for key, value in vars(self).items() if key not in {*NOT_SETTINGS, "teacher"}}


@plain_dataclass(frozen=True)
class RouteScores:
    """Scores of a route on held-out images during training.

    Args:
        metric: ``accuracy`` on labels, ``agreement`` with the teacher, or ``loss``.
        start: value of the state before training.
        best: value of the state that the route has now.
        last: value at the end of training.
        step: step of that state; 0 for the one before the first step.
        epoch: epochs done at that step.
    """

    metric: str
    start: float
    best: float
    last: float
    step: int = 0
    epoch: float = 0.0


@plain_dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Args:
        steps: number of steps done.
        seconds: seconds that training took.
        losses: mean loss of each route over the last epoch.
        scores: scores of each route on held-out images; empty where none were held out.
        held_out_images: number of held-out images.
        teacher: name of the teacher and the reason of its choice; None where there was none.
    """

    steps: int
    seconds: float
    losses: dict[str, float]
    scores: Mapping[str, RouteScores] = field(default_factory=dict)
    held_out_images: int = 0
    teacher: str | None = None
