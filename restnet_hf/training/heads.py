"""Which new heads must be trained, and with which options."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.routes.route import HeadKey, Route
from restnet_hf.training.args import AUTO, TrainArgs
from restnet_hf.training.teachers import taught_by


SHARED = ("batch_size", "seed", "mixed_precision", "dataloader_num_workers", "channels_last", "max_steps", "keep")
HEADS_TIME = 0.3  # share of the time that heads may take that are trained first
HEAD_ARGS = TrainArgs(distillation=0.0, train_head=True, num_train_epochs=20, learning_rate=3e-3)


def untrained_heads(model: StitchedModelForImageClassification, keys: Iterable[str] | None = None) -> list[Route]:
    """The anchors alone whose new heads were not trained.

    Args:
        model: model with or without new heads.
        keys: keys of the heads to consider; all but those of tuned anchors by default.
    """
    wanted = set(model.heads) if keys is None else set(keys)
    keyed = (HeadKey.parse(key) for key in model.heads if key in wanted and key not in model.config.trained_heads)
    return [Route.alone(key.anchor, key.adapter) for key in keyed if not key.tuned]


def record_trained(model: StitchedModelForImageClassification, modules: Mapping[str, Any]) -> None:
    """Record which heads were trained. Tuned anchors whose own heads were not yet begin with what their anchors have.

    Args:
        model: model with or without new heads.
        modules: modules that were trained, by name, ``heads.KEY`` for a head.
    """
    trained = {key.removeprefix("heads.") for key in modules if key.startswith("heads.")}
    before = set(model.config.trained_heads)
    for key in trained:
        own = HeadKey.parse(key)
        tuned = str(replace(own, tuned=True))
        if not own.tuned and tuned in set(model.heads) - trained - before:
            model.heads[tuned].load_state_dict(model.heads[key].state_dict())
            before.add(tuned)
    model.config.trained_heads = sorted(before | trained)


def needed_heads(model: StitchedModelForImageClassification, routes: Iterable[Route], args: TrainArgs) -> list[Route]:
    """The anchors alone whose heads must be trained before routes are: those that teach, and those that routes end in.

    Args:
        model: model of the routes.
        routes: routes that are to train.
        args: options of their training.
    """
    if not args.num_train_epochs:
        return []
    keys = set(taught_by(model, args))
    if args.distillation < 1:  # without labels the ends learn from the teacher alone
        keys |= {route.head for route in routes if route.stitch_points}
        keys |= {str(HeadKey(route.segments[0].anchor, route.adapter)) for route in routes if route.tuned}
    return untrained_heads(model, keys)


def head_args(args: TrainArgs | None) -> TrainArgs:
    """The options with which new heads train: those given, without the parts that only stitches have.

    Args:
        args: options of `train_heads`; None for the default ones.

    Raises:
        ValueError: an option is only for stitches.
    """
    if args is None:
        return HEAD_ARGS
    given = {
        "least_squares_images": args.least_squares_images,
        "matching_epochs": args.matching_epochs or None,
        "tuning": None if args.tuning == "stitch" else args.tuning,
        "teacher": None if isinstance(args.teacher, str) and args.teacher == AUTO else args.teacher,
        "train_head": None if args.train_head is not False else args.train_head,
    }
    unused = {name: value for name, value in given.items() if value is not None}
    if unused or not args.num_train_epochs:
        raise ValueError(f"train_heads trains new heads alone, on labels: leave out {unused or 'num_train_epochs=0'}")
    return replace(args, distillation=0.0, train_head=True)


def shared_options(args: TrainArgs) -> TrainArgs:
    """`HEAD_ARGS` with the batch size, seed and device options of a training that needs heads first.

    Args:
        args: options of that training.
    """
    minutes = None if args.max_minutes is None else HEADS_TIME * args.max_minutes
    return replace(HEAD_ARGS, max_minutes=minutes, **{name: getattr(args, name) for name in SHARED})
