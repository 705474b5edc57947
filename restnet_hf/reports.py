"""Reports of recipes: their rows, and whether a run has finished."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.routes.profile import Profile


def report_rows(
    model: StitchedModelForImageClassification, fitted: Profile, profile: Profile, r2: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Rows of the report, the cheapest route first.

    Args:
        model: model with its stitches.
        fitted: profile after the fit by least squares.
        profile: profile after the training.
        r2: R² of the fit by stitch.
    """
    rows, front = [], [row.route for row in profile.front()]
    for before, after in zip(fitted.routes, profile.routes, strict=True):
        row: dict[str, Any] = {"route": str(after.route), **after.costs}
        for point in after.route.stitch_points:
            if model.similarities:
                values = (similarity.value(after.route) for similarity in model.similarities)
                row["similarity"] = next((value for value in values if value is not None), None)
            row["r2"] = r2.get(point.name)
            row["accuracy_least_squares"] = before.scores["accuracy"]
        rows.append({**row, "accuracy": after.scores["accuracy"], "front": after.route in front})
    return sorted(rows, key=lambda row: row["macs"])


def report_cascades(profile: Profile) -> list[dict[str, Any]]:
    """Rows of the report for cascades, the cheapest first.

    Args:
        profile: profile after the training.
    """
    front = [row.route for row in profile.front()]
    rows = [
        {
            "cascade": str(row.route), **row.costs, **row.scores, "standard_error": row.standard_error,
            "shares": list(row.shares), "front": row.route in front,
        }
        for row in profile.cascades
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["mean_macs"])


def finished_report(out: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The report of a run that has finished; None where there is none.

    Args:
        out: folder of the run.

    Raises:
        ValueError: the report cannot be read.
    """
    file = Path(out) / "report.json"
    if not file.exists() or not (file.parent / "adapter").is_dir():
        return None
    try:
        report = json.loads(file.read_text())
        return {**report, "recipe": dict(report["recipe"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not the report of a run: {error!r}; choose another folder") from error


def report_to_resume(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """The report of a finished run of a recipe, which has nothing to resume; None where there is none.

    Args:
        recipe: entries of the recipe.
        folder: folder of the run.

    Raises:
        ValueError: the run was one of another recipe.
    """
    report = finished_report(folder)
    if report is not None:
        ours, theirs = json.loads(json.dumps(recipe, default=str)), report["recipe"]
        changed = sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])
        if changed:
            raise ValueError(
                f"{folder} holds a finished run of another recipe, which differs in {', '.join(changed)}; there is "
                "nothing to resume, so choose another folder"
            )
    return report
