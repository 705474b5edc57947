"""Anchors: frozen classifiers from transformers, timm or any module, as numbered cuts and segments between them."""

import copy
import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from restnet_hf.cuts import Cuts, find_cuts
from restnet_hf.features import Layout
from restnet_hf.labels import label_names
from restnet_hf.preprocessing import Preprocessing, timm_processor, with_image_size
from restnet_hf.routes import ANCHOR_NAME
from restnet_hf.segments import BakedSegment, Cut, outside, own_parameters, run


MIN_CUTS = 2
TIMM_PREFIXES = ("hf_hub:", "hf-hub:", "local-dir:")


class Anchor(nn.Module):
    """A frozen classifier that can be left and entered at its cuts.

    Cut 0 is the image, cuts 1 to `depth` are outputs of blocks, and None (past the last cut) is the logits. The
    weights never train and the module stays in evaluation mode.

    Args:
        model: maps images (N, 3, H, W) to logits.
        name: of letters, digits, ``_`` and ``-``; routes use it.
        preprocessing: how images are prepared for it.
        label_names: of its classes, None where they have no names.
        processor: image processor that prepares images so, if there is one.
        repo_id: where the weights come from, a Hub id or an absolute path; None for a module made in code.
        revision: commit on the Hub.
        granularity: see `find_cuts`.

    Raises:
        ValueError: the name does not fit a route.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        preprocessing: Preprocessing,
        *,
        label_names: Sequence[str] | None = None,
        processor: Any = None,
        repo_id: str | None = None,
        revision: str | None = None,
        granularity: str = "block",
    ) -> None:
        super().__init__()
        if not ANCHOR_NAME.fullmatch(name):
            raise ValueError(f"anchor name {name!r} may hold only letters, digits, '_' and '-'")
        self.model = model.requires_grad_(False)
        self.name = name
        self.preprocessing = preprocessing
        self.label_names = tuple(label_names) if label_names is not None else None
        self.processor = processor
        self.repo_id = repo_id
        self.revision = revision
        self.granularity = granularity
        self.headless = False
        self._found: Cuts | None = None
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: dropout and BatchNorm statistics of a frozen network must not move."""
        return super().train(False)

    def num_parameters(self) -> int:
        """Parameters of the network: its size, where a larger anchor is told from a smaller."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def found(self) -> Cuts:
        """What `find_cuts` found, searched for once.

        Raises:
            ValueError: there are fewer than two cuts.
        """
        if self._found is None:
            try:
                found = find_cuts(self.model, self.preprocessing.image_size, self.granularity)
            except Exception as error:  # a network may fail in any way on a size that is not its own
                size = "x".join(map(str, self.preprocessing.image_size))
                raise ValueError(f"anchor '{self.name}' cannot run on images of {size} pixels: {error}") from error
            if self.label_names is not None and len(self.label_names) != found.classes:
                raise ValueError(
                    f"anchor '{self.name}' has {found.classes} classes, but {len(self.label_names)} label_names"
                )
            if len(found.cuts) < MIN_CUTS:
                failed = "".join(f"; {name}: {reason}" for name, reason in found.rejected.items())
                raise ValueError(
                    f"anchor '{self.name}' ({type(self.model).__name__}) has {len(found.cuts)} places where every "
                    f"path goes through one map or sequence of tokens, and {MIN_CUTS} are needed{failed}. "
                    "Choose another classifier, or granularity='module' to search inside its blocks"
                )
            self._found = found
        return self._found

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The certified cuts, cut 1 first."""
        return self.found.cuts

    @property
    def depth(self) -> int:
        """The number of the last cut."""
        return len(self.cuts)

    def cut(self, index: int) -> Cut | None:
        """The cut of that number; None for 0, the image. Raises ValueError where there is none."""
        if not 0 <= index <= self.depth:
            raise ValueError(f"anchor '{self.name}' has cuts 1 to {self.depth}, not {index}")
        return self.cuts[index - 1] if index else None

    def cut_index(self, cut: int | str) -> int:
        """The number of a cut given by number or by the name of its module (any of its names)."""
        if isinstance(cut, str):
            for index, candidate in enumerate(self.cuts, 1):
                if cut in (candidate.name, *candidate.aliases):
                    return index
            raise ValueError(f"anchor '{self.name}' has no cut {cut!r}; its cuts are {[c.name for c in self.cuts]}")
        self.cut(cut)
        return cut

    def layout(self, index: int) -> Layout:
        """Layout of the activation at a cut from 1 on."""
        cut = self.cut(index)
        if cut is None:
            raise ValueError("cut 0 is the image; a stitch joins cuts from 1 on")
        return cut.layout

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run a segment.

        Args:
            x: images (N, 3, H, W) for ``start=0``, else the activation at cut ``start`` in its layout.
            stop: the cut to run to; None for the logits (N, classes), or the features (N, C) of a headless anchor.

        Raises:
            ValueError: there is no such cut, or the segment is empty.
        """
        return self.capture(x, (stop,), start)[stop]

    def capture(self, x: Tensor, stops: Collection[int | None], start: int = 0) -> dict[int | None, Tensor]:
        """The activation at every cut in ``stops``, in one forward from ``start``; None stands for the logits."""
        if start == 0 and set(stops) == {None} and not self.headless:
            return dict.fromkeys(stops, self.logits(x))  # an anchor alone needs no cuts
        wanted = {-1 if stop is None else stop: None if stop is None else self.cut(stop) for stop in stops}
        if any(stop is not None and stop <= start for stop in stops):
            raise ValueError(f"a segment of '{self.name}' that starts at cut {start} cannot stop at {sorted(wanted)}")
        result = run(self.model, x, self.cut(start), wanted, self.preprocessing.image_size, self.classifier)
        return {None if key == -1 else key: value for key, value in result.items()}

    def logits(self, x: Tensor) -> Tensor:
        """The network's own logits (N, classes) for images, whether or not a new head has taken their place."""
        return run(self.model, x, None, {0: None}, self.preprocessing.image_size)[0]

    @property
    def classifier(self) -> str | None:
        """Path of the layer that is left out; None unless the anchor is headless."""
        return self.found.classifier if self.headless else None

    def drop_classifier(self) -> int:
        """Make the anchor headless: it ends in features instead of logits. Returns the number of features.

        Raises:
            ValueError: its logits do not come from one linear layer.
        """
        if self.found.classifier is None or self.found.features is None:
            raise ValueError(
                f"anchor '{self.name}' ({type(self.model).__name__}) cannot take a new head: its logits do not come "
                "from one linear layer"
            )
        self.headless = True
        return self.found.features

    def bake(self, start: int = 0, stop: int | None = None) -> BakedSegment:
        """The segment as a plain module with only its own weights."""
        size = self.preprocessing.image_size
        last = None if stop is None else self.cut(stop)
        return BakedSegment(self.model, self.cut(start) if start else None, last, size, self.classifier).eval()

    def own_parameters(self, start: int = 0, stop: int | None = None) -> dict[str, nn.Parameter]:
        """The parameters of a segment, by name: those of the network that `bake` keeps."""
        last = None if stop is None else self.cut(stop)
        return own_parameters(self.model, outside(self.cut(start) if start else None, last, self.classifier))

    def fingerprint(self) -> str:
        """Type and SHA-256 of the weights: equal fingerprints mean equal networks."""
        digest = hashlib.sha256(type(self.model).__name__.encode())
        dtypes = set()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            dtypes |= {str(tensor.dtype).removeprefix("torch.")} if tensor.is_floating_point() else set()
        return f"{'+'.join(sorted(dtypes))}:{digest.hexdigest()}"

    def extra_repr(self) -> str:
        return f"name={self.name!r}, cuts={'not searched' if self._found is None else self.depth}"


def load_anchor(
    source: str | os.PathLike[str] | nn.Module | Anchor,
    *,
    name: str | None = None,
    revision: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    label_names: Sequence[str] | None = None,
    granularity: str = "block",
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    **hub_kwargs: Any,
) -> Anchor:
    """A classifier as an anchor.

    Args:
        source: a Hub id of transformers or timm (``timm/resnet50.a1_in1k``), a local folder of either, or a module.
        name: in routes; by default the last part of the id up to its first dot.
        revision: branch, tag or commit on the Hub.
        image_size: in pixels, instead of the anchor's own.
        preprocessing: instead of what the anchor's image processor says; for a module without one.
        label_names: class names, for an anchor that does not know them.
        dtype: of the weights, as in ``from_pretrained``.
        trust_remote_code: run code from the Hub.
        **hub_kwargs: ``token``, ``cache_dir``, ``local_files_only``, ... as in ``from_pretrained``.

    Raises:
        OSError: the model cannot be found or read.
        ValueError: how the model wants its images is not known, or options contradict each other.
    """
    if isinstance(source, Anchor):
        if any(option is not None for option in (name, revision, image_size, preprocessing, label_names)):
            raise ValueError(f"anchor '{source.name}' is made already; give its options where it is made")
        return copy.copy(source)  # of the same network, but with a name and a head of its own
    if preprocessing is not None and image_size is not None:
        raise ValueError("give either image_size or preprocessing, which holds the image size")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(source, nn.Module):
        named = getattr(source, "name_or_path", "")
        model, repo_id = source, _source_id(named) if named else None
    else:
        repo_id = _source_id(source)
        load = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code, **hub_kwargs}
        model = _pretrained(repo_id, load)
    found = _processor(model, repo_id, revision, trust_remote_code, hub_kwargs)
    preprocessing, processor = _preparation(repo_id or type(model).__name__, found, preprocessing, size)
    config = getattr(model, "config", None)
    return Anchor(
        model,
        name or _short_name(repo_id or type(model).__name__),
        preprocessing,
        label_names=label_names or _labels(config),
        processor=processor,
        repo_id=repo_id,
        revision=getattr(config, "_commit_hash", None),
        granularity=granularity,
    )


def anchor_from_config(config: dict[str, Any], name: str, preprocessing: Preprocessing, **kwargs: Any) -> Anchor:
    """An anchor of the architecture that a transformers config describes, with random weights."""
    rebuilt = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    model = AutoModelForImageClassification.from_config(rebuilt, dtype=torch.get_default_dtype())
    return Anchor(model, name, preprocessing, **kwargs)


def unique_names(anchors: Iterable[Anchor]) -> None:
    """Give the second anchor of a name the suffix ``_2``, and so on."""
    taken: set[str] = set()
    for anchor in anchors:
        name, number = anchor.name, 2
        while anchor.name in taken:
            anchor.name = f"{name}_{number}"
            number += 1
        taken.add(anchor.name)


def _source_id(source: str | os.PathLike[str]) -> str:
    text = os.fspath(source)
    for prefix in TIMM_PREFIXES:
        text = text.removeprefix(prefix)
    return str(Path(text).resolve()) if Path(text).is_dir() else text


def _pretrained(repo_id: str, load: dict[str, Any]) -> PreTrainedModel:
    hub = {key: value for key, value in load.items() if key != "dtype"}
    try:
        config = AutoConfig.from_pretrained(repo_id, **hub)
        # timm writes the class count in two places, and transformers passes both on
        if config.model_type == "timm_wrapper" and config.model_args:
            config.model_args.pop("num_classes", None)
        return AutoModelForImageClassification.from_pretrained(repo_id, config=config, **load)
    except (OSError, ValueError) as error:
        raise OSError(
            f"anchor {repo_id!r} cannot be loaded: it must be a local folder with config.json and model.safetensors, "
            f"or the Hub id of an image classifier of transformers or timm, such as 'timm/resnet50.a1_in1k'. {error}"
        ) from error


def _processor(model: nn.Module, repo_id: str | None, revision: str | None, trust: bool, hub: dict[str, Any]) -> Any:
    cfg = getattr(getattr(model, "config", None), "pretrained_cfg", None) or getattr(model, "pretrained_cfg", None)
    if cfg:
        return timm_processor(dict(cfg))
    if repo_id is None:
        return None
    at = {"revision": revision, **hub}
    if cached_file(repo_id, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **at) is None:
        return None
    return AutoImageProcessor.from_pretrained(repo_id, trust_remote_code=trust, **at)


def _preparation(
    of: str, processor: Any, preprocessing: Preprocessing | None, size: tuple[int, int] | None
) -> tuple[Preprocessing, Any]:
    """How images are prepared, and the processor that does it (None where it does otherwise)."""
    size = preprocessing.image_size if preprocessing is not None else size
    if processor is not None and size is not None:
        processor = with_image_size(processor, size)
    measured = None if processor is None else Preprocessing.of(processor)
    wanted = preprocessing or measured
    if wanted is None:
        raise ValueError(
            f"how {of} wants its images is not known: it has no image processor. Pass "
            "load_anchor(..., preprocessing=Preprocessing(image_size, mean, std))"
        )
    return wanted, processor if wanted == measured else None


def _labels(config: Any) -> tuple[str, ...] | None:
    id2label = getattr(config, "id2label", None)
    return label_names(id2label) if id2label else None


def _short_name(text: str) -> str:
    last = Path(text).name.split(".")[0]
    return "".join(character if ANCHOR_NAME.fullmatch(character) else "_" for character in last) or "anchor"
