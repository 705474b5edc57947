"""What is wrong with a recipe: its entries before anything is loaded, and with the anchors before anything trains."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from accelerate.tracking import filter_trackers

from restnet_hf.data.augment import make_augmentation
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.routes.families import WITHIN, family, within_budget
from restnet_hf.routes.profile import Budget
from restnet_hf.routes.route import Route
from restnet_hf.selection.selectors import SELECTORS
from restnet_hf.stitches.layers import BRANCH, StitchConfig
from restnet_hf.training.args import TrainArgs
from restnet_hf.training.tracking import trackers


IMAGES = {"position": 0}  # least number of calibration images by selector
LEAST_IMAGES = 4  # of the other selectors
CHECKPOINTS = "training"  # folder of the checkpoints that a recipe asks for; the run then chooses its own
CHOSEN_BY_RUN = {
    "output_dir": (None, CHECKPOINTS),
    "resume_from_checkpoint": (False,),
}  # options that a run sets itself
Check = Callable[[Any, Mapping[str, Any]], Iterable[str]]


class _NamedCutError(Exception):
    """A cut is given by name, and only the anchor can tell its number."""


def within(value: Mapping[str, Any] | None) -> bool:
    """Whether the family of a recipe stays within an anchor.

    Args:
        value: entry ``family`` of a recipe.
    """
    return (value or {}).get("kind") in WITHIN


def check_entry(name: str, value: Any, earlier: Mapping[str, Any]) -> None:
    """Raise ValueError, with all reasons, where an entry of a recipe is impossible by itself or with earlier ones.

    Args:
        name: name of the entry.
        value: value of the entry, of the right type.
        earlier: the entries before it that are right.
    """
    problems = list(CHECKS[name](value, earlier))
    if problems:
        raise ValueError("; ".join(problems))


def _error(make: Callable[[], object]) -> list[str]:
    """What is wrong with something that can be tried: the message of its error."""
    try:
        make()
    except (ValueError, TypeError) as error:
        return [str(error)]
    return []


def _method(value: str, earlier: Mapping[str, Any]) -> Iterable[str]:
    if value not in SELECTORS:
        yield f"method={value!r} is not one of {sorted(SELECTORS)}"


def _routes(value: Sequence[str] | None, earlier: Mapping[str, Any]) -> Iterable[str]:
    def named(anchor: str, cut: str) -> int:
        raise _NamedCutError

    for route in value or ():
        with suppress(_NamedCutError):
            yield from _error(lambda route=route: Route.parse(route, named))  # type: ignore[misc]


def _family(value: Mapping[str, Any] | None, earlier: Mapping[str, Any]) -> Iterable[str]:
    if {"end", "between"} <= earlier.keys() and not earlier["end"] and (earlier["between"] or not within(value)):
        yield f"one anchor needs a family of {sorted(WITHIN)}; give end, or family: {{kind: skip}}"
    if value is None:
        return
    if earlier.get("routes") or "kind" not in value:
        yield "family needs a kind, and takes the place of routes; give one of the two"
        return
    rule = {key: option for key, option in value.items() if key not in ("budget", "max_routes")}
    yield from _error(lambda: family((), **rule))
    if (budget := value.get("budget")) is not None:
        yield from _error(lambda: Budget(**budget))
    most = value.get("max_routes")
    if most is not None and (type(most) is not int or most < 1):
        yield f"max_routes={most!r} must be a whole number of at least 1"


def _stitch_kind(value: str | None, earlier: Mapping[str, Any]) -> Iterable[str]:
    if value is not None:
        yield from _error(lambda: StitchConfig(value))
    if "family" not in earlier:
        return
    between = not within(earlier["family"])
    if value == BRANCH and between and not earlier.get("routes"):
        yield f"stitches of kind {BRANCH!r} replace blocks of one anchor and cannot join two; choose another kind"
    if value not in (None, BRANCH) and (earlier["family"] or {}).get("prune"):
        yield f"prune makes copies of blocks, stitches of kind {BRANCH!r}, not {value!r}"


def _class_token(value: str, earlier: Mapping[str, Any]) -> Iterable[str]:
    return _error(lambda: StitchConfig(class_token=value))


def _augment(value: str | None, earlier: Mapping[str, Any]) -> Iterable[str]:
    return _error(lambda: make_augmentation(value))


def _label_free(value: bool, earlier: Mapping[str, Any]) -> Iterable[str]:
    if value and earlier.get("new_head"):
        yield "new heads are trained with labels; leave new_head or label_free out"


def _training(value: TrainArgs, earlier: Mapping[str, Any]) -> Iterable[str]:
    for name, allowed in CHOSEN_BY_RUN.items():
        if getattr(value, name) not in allowed:
            yield f"{name} is not an entry of a recipe: a run chooses its folder, and whether to resume, itself"
    for problem in _error(lambda: filter_trackers(trackers(value.log_with, "."), ".")):
        yield f"log_with={value.log_with!r}: {problem}"
    if value.torch_compile and value.torch_compile_backend not in torch.compiler.list_backends(exclude_tags=()):
        usual = torch.compiler.list_backends()
        yield f"torch_compile_backend={value.torch_compile_backend!r} is not one of {usual}"
    if earlier.get("augment") is not None and value.cache_dir:
        yield "augment changes images each time, so cache_dir cannot hold them; leave one of the two out"


def _stitches(value: TrainArgs, earlier: Mapping[str, Any]) -> Iterable[str]:
    yield from _training(value, earlier)
    if earlier.get("label_free") and value.num_train_epochs and value.distillation < 1:
        yield (
            "label_free leaves stitches only the anchors to learn from; set stitches.distillation to 1, or "
            "stitches.num_train_epochs to 0 and stitches.matching_epochs to 1 or more"
        )
    if earlier.get("tuned_anchors") and not value.num_train_epochs:
        yield "tuned_anchors learn the task; set stitches.num_train_epochs to 1 or more, or tuned_anchors to false"


CHECKS: dict[str, Check] = {
    "method": _method,
    "routes": _routes,
    "family": _family,
    "stitch_kind": _stitch_kind,
    "class_token": _class_token,
    "augment": _augment,
    "label_free": _label_free,
    "heads": _training,
    "stitches": _stitches,
}


def check_stitches(
    model: StitchedModelForImageClassification,
    config: StitchConfig,
    *,
    routes: Sequence[str] | None = None,
    rule: Mapping[str, Any] | None = None,
    method: str = "cka",
    images: int,
) -> None:
    """Raise ValueError where the routes that a recipe asks for cannot be made, before heads are trained for them.

    Args:
        model: model of the recipe's anchors.
        config: kind and options of the stitches.
        routes: routes of the recipe, of which all that are wrong are named.
        rule: family of the recipe.
        method: selector of the recipe, which chooses where there are neither routes nor a family.
        images: number of calibration images.
    """
    limits = (rule or {}).get("budget")
    costs = model.route_costs(config, memory="memory_mb" in (limits or {}))
    if rule is not None:
        options = {key: value for key, value in rule.items() if key not in ("budget", "max_routes")}
        stitched: Iterator[Route] = (route for route in model.family(**options) if route.stitch_points)
        if limits is not None:
            stitched = within_budget(stitched, costs, Budget(**limits))
        if not list(islice(stitched, 1)):
            raise ValueError(f"no route of family {options} is within {limits}; allow more, or other options")
    elif routes is None and images < IMAGES.get(method, LEAST_IMAGES):
        raise ValueError(f"{images} calibration images are too few for method {method!r}: {LEAST_IMAGES} at least")
    problems = [problem for route in routes or () for problem in _error(lambda r=route: costs(model.route(r)))]  # type: ignore[misc]
    if problems:
        raise ValueError("; ".join(problems))
