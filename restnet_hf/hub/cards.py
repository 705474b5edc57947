"""The card of an adapter: its routes with costs and scores, its anchors and their licences, and how to use it."""

import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from restnet_hf.routes.fronts import describe_gap
from restnet_hf.routes.profile import MEANS, AnyProfiled, Profile, ProfiledRoute
from restnet_hf.routes.tables import FRONT


TEMPLATE = Path(__file__).with_name("card.md.j2")
MAX_SHOWN = 100  # routes on a card
MAX_LENGTH = 300  # characters of one value on a card
# Characters that Markdown, HTML, tables, formulas or bare links are made of. Within a word "_" has no such meaning.
MARKUP = re.compile(
    r"[\\`*\[\]<>&|~#$]|(?<![^\W_])_|_(?![^\W_])|(?<=\S)@(?=\S)|:(?=//)|(?<=www)\.|^[-+=]|^\d(?=\d*[.)](?:\s|$))", re.I
)
MARK = "<!-- Written by restnet_hf. Delete this line to keep a text of your own when the adapter is pushed again. -->"
LIBRARY, TAG, TASK = "restnet-hf", "restnet", "image-classification"
BUCKETS = {  # upper limits of costs, for tags that the Hub can filter by
    "macs": {"100m": 1e8, "300m": 3e8, "1g": 1e9, "3g": 3e9, "10g": 1e10, "30g": 3e10},
    "params": {"1m": 1e6, "3m": 3e6, "10m": 1e7, "30m": 3e7, "100m": 1e8, "300m": 3e8},
    "memory_mb": {"3": 3.0, "10": 10.0, "30": 30.0, "100": 100.0, "300": 300.0, "1000": 1000.0},
    "latency_ms": {"1": 1.0, "3": 3.0, "10": 10.0, "30": 30.0, "100": 100.0, "300": 300.0},
}
ON_FRONT = "Routes on the front are those that no other beats in MACs and score."
ON_MEAN_FRONT = "On the front are routes and cascades that no other beats in mean MACs and score."
GAP = (
    "The gap closed is the mean over budgets between the anchors' MACs of the share of the difference between their "
    "scores that the best route within the budget gains: 0 for the anchors alone, 0.5 for a line between them."
)
CASCADES = (
    "`a[:] >0.8 b[:]` is a cascade: an image is answered by `a[:]` where its confidence is at least 0.8, else by "
    "`b[:]`; `@1.5` behind the threshold is a temperature. Mean costs and accuracies of cascades are by "
    "cross-validation, and MACs the most that an image can take."
)
COLUMNS = {  # of the table of routes: heading, factor, digits
    "macs": ("MACs, M", 1e-6, 1),
    "mean_macs": ("mean MACs, M", 1e-6, 1),
    "params": ("params, M", 1e-6, 2),
    "memory_mb": ("memory, MB", 1.0, 1),
    "latency_ms": ("latency, ms", 1.0, 2),
    "mean_latency_ms": ("mean latency, ms", 1.0, 2),
    "energy_j": ("energy, mJ", 1e3, 2),
    "accuracy": ("accuracy, %", 100.0, 2),
}


def budget_tags(profile: Profile) -> list[str]:
    """Tags such as ``macs:le-1g``, one for each bucket that the cheapest route is within."""
    tags = []
    for cost, buckets in BUCKETS.items():
        values = [row.costs[cost] for row in profile.routes if cost in row.costs]
        tags += [f"{cost}:le-{name}" for name, limit in buckets.items() if values and min(values) <= limit]
    return tags


def adapter_tags(profile: Profile | None) -> list[str]:
    """The tags by which searches find an adapter."""
    return [TAG, *(budget_tags(profile) if profile is not None else [])]


def filter_tags(limits: Mapping[str, float]) -> list[str]:
    """Tags that every adapter within the limits has: for each cost the smallest bucket not below its limit.

    No mean is below the cost of the cheapest route, which the tags are of.
    """
    tags = []
    for cost, limit in ((MEANS.get(cost, cost), limit) for cost, limit in limits.items()):
        names = [name for name, bound in BUCKETS.get(cost, {}).items() if bound >= limit]
        tags += [f"{cost}:le-{names[0]}"] if names else []
    return tags


def is_hub_id(name: str | None) -> bool:
    """Whether a name can be a Hub id, which folders and paths cannot."""
    if not name or name.count("/") != 1 or os.path.isabs(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def card_data(
    repo_id: str,
    anchors: Sequence[Mapping[str, Any]],
    profile: Profile | None,
    standalone: bool,
    tags: Iterable[str] = (),
) -> ModelCardData:
    """The metadata of a card.

    Args:
        repo_id: name of the adapter on the Hub.
        anchors: a mapping for each anchor, with ``name``, ``repo_id`` (None if others cannot fetch it) and ``license``
            (None if unknown).
        profile: routes with costs and scores; None if nothing was measured.
        standalone: whether the repository includes the anchors' weights.
        tags: tags in addition to those of costs.

    Raises:
        ValueError: JSON cannot hold the profile.
    """
    profile = _as_json(profile)
    licences = {_licence_of(anchor) for anchor in anchors}
    same = next(iter(licences)) if len(licences) == 1 and None not in licences else None
    dataset, scored = _scored(None if profile is None else _shown(profile))
    results = [
        EvalResult(TASK, dataset, dataset, "accuracy", row.scores["accuracy"], metric_name=str(row.route))
        for row in scored
        if dataset
    ]
    return ModelCardData(
        base_model=[anchor["repo_id"] for anchor in anchors if anchor["repo_id"]] or None,
        base_model_relation="merge" if standalone else "adapter",
        datasets=[dataset] if dataset and is_hub_id(dataset) else None,
        metrics=["accuracy"] if scored else None,
        library_name=LIBRARY,
        pipeline_tag=TASK,
        license=same or "other",
        license_name=None if same else "licences-of-the-anchors",
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
        tags=list(dict.fromkeys([*adapter_tags(profile), *map(str, tags)])),
        restnet=None if profile is None else _shown(profile).to_dict(),
    )


def _as_json(profile: Profile | None) -> Profile | None:
    """The profile as saving and loading would return it, so that it passes the same checks."""
    if profile is None:
        return None
    try:
        return Profile.from_dict(json.loads(json.dumps(profile.to_dict())))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"a profile for a card must be one that JSON can hold: {error}") from error


def _licence_of(anchor: Mapping[str, Any]) -> str | None:
    return anchor["license"] if isinstance(anchor["license"], str) and anchor["license"] else None


def _shown(profile: Profile) -> Profile:
    """The profile with the routes that a card shows: all, or of too many the anchors, also tuned, and the front."""
    if len(profile.routes) <= MAX_SHOWN:
        return profile
    rows = [row for row in profile.routes if len(row.route.segments) == 1]
    if all("accuracy" in row.scores and "macs" in row.costs for row in profile.routes):
        rows += [row for row in profile.pareto() if row not in rows]
    else:
        rows += sorted(profile.routes, key=lambda row: row.costs.get("macs", 0))[
            :: -(-len(profile.routes) // MAX_SHOWN)
        ]
    return replace(profile, routes=tuple(rows))


def _scored(profile: Profile | None) -> tuple[str | None, list[ProfiledRoute]]:
    """The name of the data set that routes were scored on, and those routes."""
    if profile is None:
        return None, []
    dataset = profile.metadata.get("dataset")
    return dataset if isinstance(dataset, str) else None, [row for row in profile.routes if "accuracy" in row.scores]


def eval_results(profile: Profile | None) -> list[EvalResultEntry]:
    """The accuracies of all routes as the Hub's leaderboards read them; empty if the data set is not on the Hub.

    Raises:
        ValueError: JSON cannot hold the profile.
    """
    profile = _as_json(profile)
    dataset, scored = _scored(profile)
    if profile is None or not dataset or not is_hub_id(dataset):
        return []
    facts = {key: profile.metadata.get(key) for key in ("date", "dataset_revision")}
    facts = {key: value for key, value in facts.items() if isinstance(value, str)}
    return [EvalResultEntry(dataset, TASK, row.scores["accuracy"], notes=str(row.route), **facts) for row in scored]


def _python_text(text: str) -> str:
    """A string literal of Python in ASCII, so that lookalike letters and changes of direction are visible."""
    return '"' + "".join(f"\\U{ord(c):08x}" if ord(c) > 0xFFFF else json.dumps(c)[1:-1] for c in text) + '"'


def make_card(
    repo_id: str,
    anchors: Sequence[Mapping[str, Any]],
    profile: Profile | None,
    standalone: bool = False,
    plot: str | None = None,
    tags: Iterable[str] = (),
    training: Iterable[Mapping[str, Any]] = (),
) -> ModelCard:
    """Make the card of an adapter.

    Args:
        repo_id: name of the adapter on the Hub.
        anchors: a mapping for each anchor, with ``name``, ``repo_id`` (None if others cannot fetch it), ``revision``
            and ``license`` (None if unknown).
        profile: routes with costs and scores; None if nothing was measured.
        standalone: whether the repository includes the anchors' weights.
        plot: file name of a picture; None for no picture.
        tags: tags in addition to those of costs.
        training: entries of config.json on how the stitches were fitted and trained.

    Raises:
        ValueError: JSON cannot hold the profile.
    """
    profile = _as_json(profile)
    data = card_data(repo_id, anchors, profile, standalone, tags)
    sources = [
        (a["name"], a["repo_id"] or "in this repository", a["revision"] or "", _licence_of(a) or "not stated")
        for a in anchors
    ]
    name = _one_line(repo_id).replace("`", "'")
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        mark=MARK,
        title=markdown(repo_id.split("/")[-1]),
        python_name=_python_text(name),
        shell_name=shlex.quote(name),
        standalone=standalone,
        number=len(anchors),
        routes=_routes(profile, plot),
        runtimes=_runtimes(profile),
        anchors=_table(("name", "model", "commit", "licence"), [[*map(markdown, line)] for line in sources]),
        training=_training(training),
        choice=_choice(profile),
        licence=_licence(data.license, anchors),
    )


def markdown(value: Any) -> str:
    """One line of Markdown that shows a value of an untrusted file literally, cut to ``MAX_LENGTH`` characters."""
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", _one_line(value))


def _code(value: Any) -> str:
    """One line with a value of an untrusted file in a code span, for a table."""
    text = _one_line(value).replace("`", "'").replace("|", "\\|")
    return f"`{text or ' '}`"


def _one_line(value: Any) -> str:
    try:
        text = str(value)
    except (RecursionError, ValueError):  # nested too deep, or a number with too many digits
        text = type(value).__name__
    text = text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}..."
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _routes(profile: Profile | None, plot: str | None) -> str:
    if profile is None:
        return "They were not measured: `model.profile(data)` does that."
    shown = _shown(profile)
    names = [name for name in COLUMNS if any(_value(row, name) is not None for row in shown.rows)]
    rows: list[AnyProfiled] = sorted(shown.routes, key=lambda row: row.costs.get("macs", 0))
    rows += sorted(shown.cascades[:MAX_SHOWN], key=lambda row: row.costs.get("mean_macs", 0))
    front = profile.front()
    marks = [["yes" if any(row is each for each in front) else ""] if front else [] for row in rows]
    printed = [(_code(r.route), *(_printed(r, name) for name in names), *m) for r, m in zip(rows, marks, strict=True)]
    head = ("route", *(COLUMNS[name][0] for name in names), *([FRONT] if front else []))
    parts = [_table(head, printed), _measured(profile)]
    if front:
        gap = describe_gap(profile.rows, profile.default_cost, profile.find_score() or "")
        on_front = ON_MEAN_FRONT if profile.cascades else ON_FRONT
        parts.append(f"{on_front} {markdown(gap[:1].upper() + gap[1:])}. {GAP}" if gap else on_front)
    if len(shown) < len(profile):
        parts.append(f"These are {len(shown)} of {len(profile)} routes; profile.json has all.")
    if shown.cascades:
        parts.append(CASCADES)
    if any(row.route.via for row in shown.routes):
        parts.append("A stitch with a name, as in `a[:7] +name b[11:]`, is one that several routes may share.")
    if any(row.route.tuned for row in shown.routes):
        parts.append("`tuned a[:]` is the anchor `a` with tuned weights, and a head, of this adapter.")
    if plot:
        parts.append(f"![accuracy against MACs of every route]({quote(plot, errors='replace')})")
    return "\n\n".join(parts)


def _runtimes(profile: Profile | None) -> str:
    """The table of exported routes."""
    rows = []
    for entry in () if profile is None else profile.metadata.get("runtimes", ()):
        threads = entry["threads"]
        where = f"{entry['device']}, {threads} thread{'s' if threads > 1 else ''}"
        for route, measured in entry["routes"].items():
            shares = [
                f"{100 * measured[score]:.1f}" if score in measured else "" for score in ("agreement", "accuracy")
            ]
            facts = map(markdown, (entry["runtime"], entry["precision"], where))
            rows.append((_code(route), *facts, f"{measured['latency_ms']:.2f}", *shares))
    if not rows:
        return ""
    head = ("route", "runtime", "precision", "device", "latency, ms", "agreement, %", "accuracy, %")
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)] if head[0] == "route" else ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(row: Any, name: str) -> float | None:
    return row.scores.get(name) if name == "accuracy" else row.costs.get(name)


def _printed(row: Any, name: str) -> str:
    _, factor, digits = COLUMNS[name]
    value = _value(row, name)
    return "" if value is None else f"{value * factor:.{digits}f}"


def _measured(profile: Profile) -> str:
    facts = {key: markdown(value) for key, value in profile.metadata.items()}
    parts = []
    if "images" in facts:
        parts.append(f"on {facts['images']} images of {facts.get('dataset', 'a data set that was not named')}")
    parts += [f"on {facts[key]}" for key in ("device", "date") if key in facts]
    versions = profile.metadata.get("versions", {})
    pairs = versions.items() if isinstance(versions, Mapping) else [("versions", versions)]
    listed = ", ".join(f"{markdown(name)} {markdown(version)}" for name, version in pairs)
    return f"Measured {', '.join(parts)}{f' with {listed}' if listed else ''}. Costs are for one image."


def _training(stages: Iterable[Mapping[str, Any]]) -> str:
    lines = []
    for stage in stages:
        settings = [(key, value) for key, value in stage.items() if key != "stage" and value is not None]
        listed = ", ".join(f"{markdown(key)} {markdown(value)}" for key, value in settings)
        lines.append(f"- {markdown(stage.get('stage', 'training'))}: {listed}")
    return "\n".join(lines) or "The stitches are as they were made: neither fitted nor trained."


def _choice(profile: Profile | None) -> str:
    if profile is None or not profile.routes or not all("macs" in row.costs for row in profile.routes):
        return "model.set_route(model.routes[0])"
    middle = sorted(row.costs["macs"] for row in profile.routes)[len(profile.routes) // 2]
    means = [row.costs["mean_macs"] for row in profile.cascades if "mean_macs" in row.costs]
    if means and all("mean_macs" in row.costs for row in profile.routes):
        mean = sorted(means)[len(means) // 2]
        return f"model.set_budget(mean_macs={math.ceil(mean)})  # a cascade; or macs=, params=, or set_route(...)"
    return f"model.set_budget(macs={middle:.0f})  # or params=, or set_route(...)"


def _licence(chosen: Any, anchors: Sequence[Mapping[str, Any]]) -> str:
    if chosen != "other":
        return "All anchors have this licence, and so has the adapter."
    stated = ", ".join(f"{markdown(a['name'])}: {markdown(_licence_of(a) or 'not stated')}" for a in anchors)
    return f"The anchors' licences differ or are not stated ({stated}). Keep to all of them."
