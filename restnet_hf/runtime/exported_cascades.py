"""Cascades of an exported folder: which of its parts their stages run, and how they run. No torch."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from restnet_hf.errors import quote
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.confidences import measure_confidence


IMAGES = ""  # the images, among the names of what a stage can begin with
MAX_PARTS = 64  # of a stage, which has as many as later stages begin within it
RunPart = Callable[[str, np.ndarray], np.ndarray]
"""A function from the name of a part and its input (N, ...) to its output (N, ...)."""


@dataclass(frozen=True)
class ExportedStage:
    """What a route of an exported cascade runs for the images that reach it.

    Args:
        start: name of the earlier part whose output it begins with; empty for the images.
        parts: names of the parts that run in turn; the last one returns logits.
    """

    start: str
    parts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain JSON values."""
        return {"start": self.start, "parts": list(self.parts)}


def read_stages(data: Any, known: Collection[str], cascade: Cascade) -> tuple[ExportedStage, ...]:
    """The stages of a cascade from JSON.

    Args:
        data: list of what `ExportedStage.to_dict` returned.
        known: names of the folder's parts.
        cascade: cascade that the stages are of.

    Raises:
        ValueError: these are not stages of the cascade, made of such parts.
    """
    if not isinstance(data, list) or len(data) != len(cascade.routes):
        raise ValueError(f"cascade {quote(str(cascade))} needs a list of {len(cascade.routes)} stages")
    stages, reached = [], {IMAGES}
    for stage in data:
        start, parts = (stage.get("start"), stage.get("parts")) if isinstance(stage, Mapping) else (None, None)
        parts = parts if isinstance(parts, list) and len(parts) <= MAX_PARTS else []
        named = all(isinstance(part, str) and part in known for part in parts)
        if not parts or not named or not isinstance(start, str) or start not in reached:
            raise ValueError(f"a stage of cascade {quote(str(cascade))} is invalid: {quote(stage)}")
        stages.append(ExportedStage(start, tuple(parts)))
        reached |= {*parts[:-1]}
    return tuple(stages)


def run_stages(
    run: RunPart, images: np.ndarray, stages: Sequence[ExportedStage], cascade: Cascade
) -> tuple[np.ndarray, np.ndarray]:
    """Run a cascade on images; a part that two stages share runs once for an image.

    Args:
        run: function that runs a part.
        images: images (N, 3, H, W) as they are prepared for the folder.
        stages: stages of the cascade.
        cascade: cascade of exported routes, with thresholds.

    Returns:
        Logits (N, classes) of the route that answered each image, in the order of the images, and the number of that
        route (N,), from 0.
    """
    saved, rows, previous = {IMAGES: images}, np.arange(len(images)), None
    answers: list[tuple[np.ndarray, np.ndarray, int]] = []
    for index, stage in enumerate(stages):
        later = {each.start for each in stages[index + 1 :]}
        logits = _run_stage(run, stage, saved, later)
        sure = np.ones(len(rows), bool)
        if index < len(cascade.thresholds):
            temperature = cascade.temperatures[index] if cascade.temperatures else 1.0
            confidence = measure_confidence(logits.astype(np.float32), cascade.confidence, temperature, previous)
            sure = confidence >= cascade.thresholds[index]
        answers.append((rows[sure], logits[sure], index))
        if sure.all():
            break
        rows, previous = rows[~sure], logits.argmax(-1)[~sure]
        saved = {name: x[~sure] for name, x in saved.items() if name in later}
    order = np.concatenate([rows for rows, *_ in answers]).argsort()
    logits = np.concatenate([logits for _, logits, _ in answers])[order]
    return logits, np.concatenate([np.full(len(rows), index) for rows, _, index in answers])[order]


def _run_stage(run: RunPart, stage: ExportedStage, saved: dict[str, np.ndarray], later: Collection[str]) -> np.ndarray:
    """Run a stage, and save the outputs at which later stages begin; returns logits."""
    x = saved[stage.start]
    for part in stage.parts:
        x = run(part, x)
        if part in later:
            saved[part] = x
    return x


def script_lines(stages: Sequence[ExportedStage], cascade: Cascade, expressions: Mapping[str, str]) -> list[str]:
    """Lines of Python that run a cascade on one image, from ``x`` (1, 3, H, W) to ``logits`` (classes,).

    Args:
        stages: stages of the cascade.
        cascade: cascade of exported routes, with thresholds.
        expressions: for each part, an expression from ``x`` to its output for one image.

    Raises:
        ValueError: the confidence is one that a script does not have.
    """
    if cascade.confidence not in SCRIPTS:
        raise ValueError(
            f"run.py has no expression for confidence '{cascade.confidence}', only for {sorted(SCRIPTS)}; calibrate "
            "with one of these"
        )
    lines, indent = ['saved = {"": x}', "previous = None"], ""
    for index, stage in enumerate(stages):
        lines.append(f"{indent}x = saved[{stage.start!r}]")
        for part in stage.parts:
            lines.append(f"{indent}x = saved[{part!r}] = np.ascontiguousarray({expressions[part]}, np.float32)[None]")
        lines.append(f"{indent}logits = x[0]")
        if index < len(cascade.thresholds):
            temperature = cascade.temperatures[index] if cascade.temperatures else 1.0
            lines += [
                f"{indent}p = np.exp((logits - logits.max()) / {temperature!r})",
                f"{indent}p /= p.sum()",
                f"{indent}sure = {SCRIPTS[cascade.confidence]}",
                f"{indent}previous = logits.argmax()",
                f"{indent}if sure < {cascade.thresholds[index]!r}:  # the next route answers",
            ]
            indent += "    "
    return lines


SCRIPTS = {  # confidences of one image from its probabilities ``p``, as in `CONFIDENCES`
    "probability": "p.max()",
    "margin": "np.subtract(*np.sort(p)[:-3:-1])",
    "entropy": "1 + (p * np.log(np.maximum(p, 1e-38))).sum() / np.log(len(p))",
    "agreement": "p.max() if previous is None else p[previous]",
}
