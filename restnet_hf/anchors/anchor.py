"""Anchors: frozen classifiers from transformers, timm or any module, as numbered cuts and segments between them."""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from restnet_hf.anchors.cut import Cut
from restnet_hf.anchors.cut_cache import cached_cuts
from restnet_hf.anchors.discovery import MIN_CUTS, Cuts, find_cuts
from restnet_hf.anchors.layouts import AnyLayout
from restnet_hf.anchors.segments import (
    BakedSegment,
    remaining_parameters,
    remaining_tensors,
    replace_tensors,
    run_segment,
    unused_paths,
)
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.hashing import Piece, WeightsSnapshot, fingerprint, weights_sha256
from restnet_hf.routes.route import ANCHOR_NAME


_SEARCHING = threading.RLock()  # a search traces a network, which no other thread may run meanwhile

TunedTensors = Callable[[int, int | None], Mapping[str, Tensor]]  # tensors by name, for a start and a stop


class Anchor(nn.Module):
    """A frozen classifier that can be left and entered at its cuts.

    Cut 0 is the image, cuts 1 to `depth` are outputs of blocks, and None (past the last cut) is the logits. The
    weights never train and the module stays in evaluation mode.

    Args:
        model: classifier that maps images (N, 3, H, W) to logits.
        name: name in routes, of letters, digits, ``_`` and ``-``.
        preprocessing: size and normalisation of the anchor's images.
        label_names: names of the classes, None where they have no names.
        processor: image processor that prepares images so; None where there is none.
        repo_id: Hub id or absolute path that the weights come from; None for a module made in code.
        revision: commit of the weights on the Hub.
        granularity: ``block`` or ``module``, the places that may be cuts; see `find_cuts`.

    Raises:
        ValueError: the name cannot be used in a route.
    """

    # set by the model's activation_checkpointing_enable(), as on any module of transformers that has them
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

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
        self.absent: set[str] = set()  # names of weights that are not in memory
        self._found: Cuts | None = None
        self._expected: dict[int, tuple[Piece, dict[str, Tensor]]] = {}
        self.snapshot = WeightsSnapshot()
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: dropout and BatchNorm statistics of a frozen network must not move."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        like = next(self.parameters(), None)
        new = like if like is None else fn(like)
        if like is None or new is None or new is like:
            return super()._apply(fn, recurse)
        if self._expected:
            self.verify()  # cast or moved, the weights cannot be checked any more, or are read in any case
        cast = new.dtype != like.dtype and bool(self.snapshot.records)
        names = self.snapshot.match(self.weights()) if cast else {}
        super()._apply(fn, recurse)
        if cast:
            self.snapshot.renew(self.weights(), names)
        return self

    def num_parameters(self) -> int:
        """Number of parameters of the network, by which anchors are ordered."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def search_result(self) -> Cuts:
        """The result of `find_cuts`, which runs once, on first use.

        Raises:
            ValueError: there are fewer than two cuts.
        """
        if self._found is None:
            with _SEARCHING:
                self._found = self._found or self._search()
        return self._found

    def _search(self) -> Cuts:
        size = self.preprocessing.image_size
        search = partial(find_cuts, self.model, size, self.granularity)
        try:
            result = cached_cuts(self.model, size, self.granularity, search)
        except Exception as error:  # a network may fail in any way on a size that is not its own
            pixels = "x".join(map(str, size))
            raise ValueError(f"anchor '{self.name}' cannot run on images of {pixels} pixels: {error}") from error
        if self.label_names is not None and len(self.label_names) != result.classes:
            raise ValueError(
                f"anchor '{self.name}' has {result.classes} classes, but {len(self.label_names)} label_names"
            )
        if len(result.cuts) < MIN_CUTS:
            failed = "".join(f"; {name}: {reason}" for name, reason in result.rejected.items())
            raise ValueError(
                f"anchor '{self.name}' ({type(self.model).__name__}) has {len(result.cuts)} places where every "
                f"path goes through one map or sequence of tokens, and {MIN_CUTS} are needed{failed}. "
                "Choose another classifier, or granularity='module' to search inside its blocks"
            )
        return result

    def search(self) -> None:
        """Find the cuts now rather than on first use; raises as `search_result` does."""
        _ = self.search_result

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The certified cuts, cut 1 first."""
        return self.search_result.cuts

    @property
    def depth(self) -> int:
        """The number of the last cut."""
        return len(self.cuts)

    def cut(self, index: int) -> Cut | None:
        """The cut with a number; None for 0, the image. Raises ValueError where there is no such cut."""
        if not 0 <= index <= self.depth:
            raise ValueError(f"anchor '{self.name}' has cuts 1 to {self.depth}, not {index}")
        return self.cuts[index - 1] if index else None

    def cut_index(self, cut: int | str) -> int:
        """The number of a cut that is given by number or by any name of its module."""
        if isinstance(cut, str):
            for index, candidate in enumerate(self.cuts, 1):
                if cut in (candidate.name, *candidate.aliases):
                    return index
            raise ValueError(
                f"anchor '{self.name}' has no cut {cut!r}; a cut is a map or a grid of tokens that every path goes "
                f"through. Its cuts are {[c.name for c in self.cuts]}"
            )
        self.cut(cut)
        return cut

    def layout(self, index: int) -> AnyLayout:
        """The layout of the activation at a cut from 1 on."""
        cut = self.cut(index)
        if cut is None:
            raise ValueError("cut 0 is the image; a stitch joins cuts from 1 on")
        return cut.layout

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None, tuned: TunedTensors | None = None) -> Tensor:
        """Run a segment. With activation checkpointing, only the activations at cuts are kept for the backward pass.

        Args:
            x: images (N, 3, H, W) for ``start=0``, else the activation at cut ``start`` in its layout.
            start: cut to run from; 0 for the image.
            stop: cut to run to; None for the logits (N, classes), or the features (N, C) of a headless anchor.
            tuned: function of a start and a stop that returns tensors to use instead of the network's own, by name.

        Raises:
            ValueError: there is no such cut, or the segment is empty.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled() and x.requires_grad and start:
            inner = range(start + 1, self.depth + 1 if stop is None else stop)
            for ends in pairwise([start, *inner, stop]):
                x = self._gradient_checkpointing_func(self._segment, x, *ends, tuned)
            return x
        return self._segment(x, start, stop, tuned)

    def _segment(self, x: Tensor, start: int, stop: int | None, tuned: TunedTensors | None) -> Tensor:
        return self.capture(x, (stop,), start, tensors={} if tuned is None else tuned(start, stop))[stop]

    def capture(
        self,
        x: Tensor,
        stops: Collection[int | None],
        start: int = 0,
        see: Callable[[int, Tensor], Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        features: bool = False,
    ) -> dict[int | None, Any]:
        """The activation at every cut in ``stops``, in one forward from ``start``; None stands for the logits.

        Args:
            x: images (N, 3, H, W) for ``start=0``, else the activation at cut ``start`` in its layout.
            stops: numbers of the cuts to read; None for the logits.
            start: cut at which ``x`` enters; 0 for the image.
            see: function called with each cut and activation once it is computed; its result is kept instead.
            tensors: tensors to use instead of the network's own, by name.
            features: whether to return the classifier's input (N, C) for None; the logits where there is no linear
                classifier.
        """
        classifier = self.search_result.classifier if features else self.classifier if self.headless else None
        if start == 0 and set(stops) == {None} and not (classifier or tensors):
            return dict.fromkeys(stops, self.logits(x))  # an anchor alone needs no cuts
        wanted = {-1 if stop is None else stop: None if stop is None else self.cut(stop) for stop in stops}
        if any(stop is not None and stop <= start for stop in stops):
            raise ValueError(f"a segment of '{self.name}' that starts at cut {start} cannot stop at {sorted(wanted)}")
        if self._expected:
            self.verify(start, None if -1 in wanted else max(wanted))
        if self.absent:
            self.check_in_memory(start, None if -1 in wanted else max(wanted))
        size = self.preprocessing.image_size
        result = run_segment(self.model, x, self.cut(start), wanted, size, classifier, see, tensors or {})
        return {None if key == -1 else key: value for key, value in result.items()}

    def logits(self, x: Tensor) -> Tensor:
        """The network's own logits (N, classes) for images, also where a new head replaces its classifier."""
        if self._expected:
            self.verify()
        if self.absent:
            self.check_in_memory()
        return run_segment(self.model, x, None, {0: None}, self.preprocessing.image_size)[0]

    @property
    def classifier(self) -> str | None:
        """Path of the classifier that is left out; None unless the anchor is headless."""
        return self.search_result.classifier if self.headless else None

    def drop_classifier(self) -> int:
        """Make the anchor headless: it ends in features instead of logits. Returns the number of features.

        Raises:
            ValueError: the logits do not come from one linear layer.
        """
        if self.search_result.classifier is None or self.search_result.features is None:
            raise ValueError(
                f"anchor '{self.name}' ({type(self.model).__name__}) cannot take a new head: its logits do not come "
                "from one linear layer"
            )
        self.headless = True
        return self.search_result.features

    def bake(
        self, start: int = 0, stop: int | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> BakedSegment:
        """Make a plain module of a segment with only its own weights, or with ``tensors`` instead of some of them."""
        self.verify(start, stop)
        size = self.preprocessing.image_size
        last = None if stop is None else self.cut(stop)
        baked = BakedSegment(self.model, self.cut(start), last, size, self.classifier).eval()
        replace_tensors(baked.model, tensors or {})
        return baked

    def own_parameters(self, start: int = 0, stop: int | None = None) -> dict[str, nn.Parameter]:
        """The parameters of a segment by name: those of the network that `bake` keeps."""
        last = None if stop is None else self.cut(stop)
        return remaining_parameters(
            self.model, unused_paths(self.cut(start) if start else None, last, self.classifier)
        )

    def pieces(
        self, given: Mapping[str, Tensor] | None = None, names: Mapping[str, str | None] | None = None
    ) -> list[Piece]:
        """The pieces of the network from cut to cut, each with the SHA-256 of its weights.

        Args:
            given: weights to use instead of the network's own, by name.
            names: present names of weights by the names to use for them; weights without one are then left out.
        """
        renamed = None if names is None else {now: name for name, now in names.items()}
        pieces = []
        for index, cut in enumerate((*self.cuts, None)):
            tensors = {key: (given or {}).get(key, tensor) for key, tensor in self._piece_tensors(index).items()}
            if renamed is not None:
                tensors = {renamed[key]: tensor for key, tensor in tensors.items() if key in renamed}
            shape = cut.layout.shape(1)[1:] if cut else ()
            pieces.append(Piece.of(cut.name if cut else None, shape, tensors))
        return pieces

    def _piece_tensors(self, index: int) -> dict[str, Tensor]:
        stop = None if index == self.depth else self.cut(index + 1)
        return remaining_tensors(self.model, unused_paths(self.cut(index), stop, None))

    def fingerprint(self) -> str:
        """Types of the weights and a SHA-256 of class, cuts and weights; equal fingerprints mean equal networks."""
        return fingerprint(self.model, self.pieces())

    def weights(self, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor | None]:
        """Parameters and saved buffers by name, or ``given`` instead; None for a tensor that is not in memory."""
        own, recorded = remaining_tensors(self.model, ()), self.snapshot.records.keys()
        if given and recorded and recorded <= given.keys():  # whatever a wrapper made of the network's own
            return {key: given[key] for key in recorded}
        own |= {key: tensor for key, tensor in (given or {}).items() if key in own}
        return {key: None if key in self.absent else tensor for key, tensor in own.items()}

    def record_weights(self) -> None:
        """Record the weights for `changed_weights`, unless they are recorded already."""
        if not self.snapshot.records:
            self.snapshot.add({key: tensor for key, tensor in self.weights().items() if tensor is not None})

    def changed_weights(
        self, pieces: Sequence[Piece] | None = None, given: Mapping[str, Tensor] | None = None
    ) -> list[str]:
        """Names of the weights that differ from those recorded or expected.

        Args:
            pieces: pieces to compare with where no weights were recorded.
            given: weights to use instead of the network's own, by name.
        """
        unrecorded = not self.snapshot.records and not self._expected and pieces is not None
        changed: list[str] = []
        pending = self._pending(pieces or ()) if unrecorded else self._expected
        for index, (expected, tensors) in list(pending.items()):
            if tensors.keys() & self.absent:
                continue
            tensors = {key: (given or {}).get(key, tensor) for key, tensor in tensors.items()}
            if not expected.holds(tensors):
                changed += tensors
            elif not unrecorded:
                self.snapshot.add(tensors)
                self._expected.pop(index, None)
        if unrecorded and not changed:
            self.record_weights()
        changed += [name for name, now in self.snapshot.match(self.weights(given)).items() if now is None]
        return list(dict.fromkeys(changed))

    def expect_weights(self, pieces: Sequence[Piece]) -> None:
        """Check the weights of each piece when it first runs; a difference is a ValueError then.

        Until then the weights of a memory-mapped file need not be read.

        Args:
            pieces: pieces of the network with the expected SHA-256.
        """
        self._expected = self._pending(pieces)
        for _, tensors in self._expected.values():
            self.snapshot.add(tensors, read=False)

    def _pending(self, pieces: Sequence[Piece]) -> dict[int, tuple[Piece, dict[str, Tensor]]]:
        return {index: (piece, self._piece_tensors(index)) for index, piece in enumerate(pieces)}

    def verify(self, start: int = 0, stop: int | None = None) -> None:
        """Check the weights of a segment against the expected ones.

        Raises:
            ValueError: the weights differ.
        """
        end = self.depth + 1 if stop is None else stop
        for index, (expected, tensors) in list(self._expected.items()):
            if not start <= index < end:
                continue
            if not expected.holds(tensors):
                raise ValueError(
                    f"the weights of anchor '{self.name}' from cut {index} to {index + 1} have SHA-256 "
                    f"{weights_sha256(tensors)}; the adapter was made for {expected.sha256}. Load it with the right "
                    f"network: from_pretrained(..., anchors={{{self.name!r}: a module or a folder}}). Before you "
                    f"change them yourself, as merging LoRA does, call model.anchors[{self.name!r}].verify()"
                )
            self.snapshot.add(tensors)
            self._expected.pop(index, None)  # another thread may have been faster

    def check_in_memory(self, start: int = 0, stop: int | None = None) -> None:
        """Raise ValueError where weights of a segment are not in memory."""
        gone = sorted(self.absent & self.own_parameters(start, stop).keys()) if self.absent else []
        if gone:
            raise ValueError(
                f"weights of anchor '{self.name}' are not in memory ({gone[0]} and {len(gone) - 1} more), since the "
                "model was pruned to other routes, or only loads the weights of the active route: set_route "
                "loads them where page_to was called; else load the model again"
            )

    def extra_repr(self) -> str:
        """The name and the number of cuts, for ``print``."""
        return f"name={self.name!r}, cuts={'not searched' if self._found is None else self.depth}"


def make_names_unique(anchors: Iterable[Anchor]) -> None:
    """Give the second anchor of a name the suffix ``_2``, and so on, and each a `free_name`."""
    taken: set[str] = set()
    for anchor in anchors:
        anchor.name = name = free_name(anchor.name)
        number = 2
        while anchor.name in taken:
            anchor.name = f"{name}_{number}"
            number += 1
        taken.add(anchor.name)


def free_name(name: str) -> str:
    """The name, with ``_`` appended where it is an attribute of modules, which torch does not allow as a name."""
    while hasattr(nn.ModuleDict(), name):
        name += "_"
    return name


def largest_anchor(anchors: Iterable[Anchor]) -> Anchor:
    """The anchor with the most parameters; of several, the first."""
    return max(anchors, key=Anchor.num_parameters)
