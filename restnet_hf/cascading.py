"""Run cascades: a batch is split, and unsure images go on from what an earlier route computed for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import ImageClassifierOutput

from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.confidences import measure_confidence
from restnet_hf.routes.route import Route
from restnet_hf.steps import Step, Walk, split_at_shared_cuts


Place = tuple[str, ...]
"""A place in the computation: the names of the steps that lead there; empty for the images."""


@dataclass
class CascadeOutput(ImageClassifierOutput):
    """What `StitchedModelForImageClassification` returns where a cascade ran.

    Args:
        loss: loss, where labels were given.
        logits: logits (N, classes), each image's from the route that answered it.
        hidden_states: always None, as in `ImageClassifierOutput` without them.
        attentions: always None, as in `ImageClassifierOutput` without them.
        answered_by: number in the cascade, from 0, of the route that answered each image (N,).
    """

    answered_by: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """What a route of a cascade runs for an image that the routes before it have left open.

    Args:
        route: route of the cascade that this is a part of.
        start: place at which it begins, the last that an earlier route has come through, or the images.
        steps: steps from there to the logits.
        saved: places behind some of these steps at which later routes begin, by number of steps done.
    """

    route: Route
    start: Place
    steps: tuple[Step, ...]
    saved: dict[int, Place]


def plan_stages(walks: Sequence[Walk]) -> list[Stage]:
    """What each route of a cascade still has to run; what it shares with an earlier one runs once.

    Args:
        walks: routes with their steps, in the order of the cascade.
    """
    split = split_at_shared_cuts(walks)
    names = [tuple(step.name for step in steps) for _, steps in split]
    starts = [
        max((count_shared_steps(each, earlier) for earlier in names[:at]), default=0) for at, each in enumerate(names)
    ]
    needed = {names[index][:start] for index, start in enumerate(starts)}
    return [
        Stage(
            route,
            names[index][:start],
            tuple(steps[start:]),
            {at - start: names[index][:at] for at in range(start + 1, len(steps) + 1) if names[index][:at] in needed},
        )
        for index, ((route, steps), start) in enumerate(zip(split, starts, strict=True))
    ]


def count_shared_steps(first: Place, second: Place) -> int:
    """Number of steps that two routes have in common, from the images on."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


def run_cascade(x: Tensor, stages: Sequence[Stage], cascade: Cascade) -> tuple[Tensor, Tensor]:
    """Run a cascade on images.

    Args:
        x: images (N, 3, H, W).
        stages: what each route runs, from `plan_stages`.
        cascade: the cascade, with thresholds.

    Returns:
        Logits (N, classes) of the route that answered each image, in the order of the images, and the number of that
        route (N,), from 0.
    """
    saved: dict[Place, Tensor] = {(): x}
    rows, previous = np.arange(len(x)), None
    answers: list[tuple[int, np.ndarray, Tensor]] = []
    for index, stage in enumerate(stages):
        logits = _run_stage(stage, saved)
        if index == len(stages) - 1:
            answers.append((index, rows, logits))
            break
        array = logits.detach().float().cpu().numpy()
        temperature = cascade.temperatures[index] if cascade.temperatures else 1.0
        confidence = measure_confidence(array, cascade.confidence, temperature, previous)
        sure = confidence >= cascade.thresholds[index]
        if sure.all():
            answers.append((index, rows, logits))
            break
        previous = array.argmax(-1)
        if sure.any():  # else all go on, and nothing is copied
            done, left = (torch.from_numpy(np.flatnonzero(which)).to(x.device) for which in (sure, ~sure))
            answers.append((index, rows[sure], logits[done]))
            rows, previous = rows[~sure], previous[~sure]
            wanted = {later.start for later in stages[index + 1 :]}
            saved = {place: each[left] for place, each in saved.items() if place in wanted}
    return _in_order(answers)


def _run_stage(stage: Stage, saved: dict[Place, Tensor]) -> Tensor:
    """Run a stage, and save the places at which later routes begin; returns logits."""
    x = saved[stage.start]
    for done, step in enumerate(stage.steps, 1):
        x = step(x)
        if done in stage.saved:
            saved[stage.saved[done]] = x
    return x


def _in_order(answers: Sequence[tuple[int, np.ndarray, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits in the order of the images, and the number of the route that each image's are from."""
    if len(answers) == 1:
        index, _, logits = answers[0]
        return logits, torch.full((len(logits),), index, device=logits.device)
    order = np.concatenate([rows for _, rows, _ in answers]).argsort()
    numbers = np.concatenate([np.full(len(rows), index) for index, rows, _ in answers])[order]
    logits = torch.cat([logits for *_, logits in answers])
    return logits[torch.from_numpy(order).to(logits.device)], torch.from_numpy(numbers).to(logits.device)
