"""Anchors: frozen classifiers from transformers, timm or any module, as numbered cuts and segments between them."""

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
from restnet_hf.anchors.segments import BakedSegment, outside, own_parameters, own_tensors, replace_tensors, run
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.hashing import Piece, Seal, fingerprint, weights_sha256
from restnet_hf.routes.route import ANCHOR_NAME


Replaced = Callable[[int, int | None], Mapping[str, Tensor]]


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

    # Both are set by the model's activation_checkpointing_enable(), as on any module of transformers that has them.
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
        self._expected: dict[int, tuple[str, dict[str, Tensor]]] = {}
        self.seal = Seal()
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
        cast = new.dtype != like.dtype and bool(self.seal.marks)
        names = self.seal.match(self.weights()) if cast else {}
        super()._apply(fn, recurse)
        if cast:
            self.seal.renew(self.weights(), names)
        return self

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
            size = self.preprocessing.image_size
            search = partial(find_cuts, self.model, size, self.granularity)
            try:
                found = cached_cuts(self.model, size, self.granularity, search)
            except Exception as error:  # a network may fail in any way on a size that is not its own
                pixels = "x".join(map(str, size))
                raise ValueError(f"anchor '{self.name}' cannot run on images of {pixels} pixels: {error}") from error
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

    def search(self) -> None:
        """Find the cuts now, not on first need; raises as `found` does."""
        _ = self.found

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
            raise ValueError(
                f"anchor '{self.name}' has no cut {cut!r}; a cut is a map or a grid of tokens that every path goes "
                f"through. Its cuts are {[c.name for c in self.cuts]}"
            )
        self.cut(cut)
        return cut

    def layout(self, index: int) -> AnyLayout:
        """Layout of the activation at a cut from 1 on."""
        cut = self.cut(index)
        if cut is None:
            raise ValueError("cut 0 is the image; a stitch joins cuts from 1 on")
        return cut.layout

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None, tuned: Replaced | None = None) -> Tensor:
        """Run a segment. With activation checkpointing, the way back keeps the activations at cuts alone.

        Args:
            x: images (N, 3, H, W) for ``start=0``, else the activation at cut ``start`` in its layout.
            stop: the cut to run to; None for the logits (N, classes), or the features (N, C) of a headless anchor.
            tuned: gives, for a start and a stop, the tensors that take the place of the network's own, by name.

        Raises:
            ValueError: there is no such cut, or the segment is empty.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled() and x.requires_grad and start:
            inner = range(start + 1, self.depth + 1 if stop is None else stop)
            for piece in pairwise([start, *inner, stop]):
                x = self._gradient_checkpointing_func(self._segment, x, *piece, tuned)
            return x
        return self._segment(x, start, stop, tuned)

    def _segment(self, x: Tensor, start: int, stop: int | None, tuned: Replaced | None) -> Tensor:
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
            x: as of `forward`.
            stops: cuts to read.
            start: where ``x`` belongs.
            see: is called with each cut and its activation as it comes; what it returns is kept instead.
            tensors: in the place of the network's own, by name.
            features: give what the classifier takes, (N, C), for None; the logits where there is no linear classifier.
        """
        classifier = self.found.classifier if features else self.classifier if self.headless else None
        if start == 0 and set(stops) == {None} and not (classifier or tensors):
            return dict.fromkeys(stops, self.logits(x))  # an anchor alone needs no cuts
        wanted = {-1 if stop is None else stop: None if stop is None else self.cut(stop) for stop in stops}
        if any(stop is not None and stop <= start for stop in stops):
            raise ValueError(f"a segment of '{self.name}' that starts at cut {start} cannot stop at {sorted(wanted)}")
        if self._expected:
            self.verify(start, None if -1 in wanted else max(wanted))
        if self.absent:
            self.check_present(start, None if -1 in wanted else max(wanted))
        size = self.preprocessing.image_size
        result = run(self.model, x, self.cut(start), wanted, size, classifier, see, tensors or {})
        return {None if key == -1 else key: value for key, value in result.items()}

    def logits(self, x: Tensor) -> Tensor:
        """The network's own logits (N, classes) for images, whether or not a new head has taken their place."""
        if self._expected:
            self.verify()
        if self.absent:
            self.check_present()
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

    def bake(
        self, start: int = 0, stop: int | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> BakedSegment:
        """The segment as a plain module with only its own weights, or with ``tensors`` in the place of them."""
        self.verify(start, stop)
        size = self.preprocessing.image_size
        last = None if stop is None else self.cut(stop)
        baked = BakedSegment(self.model, self.cut(start), last, size, self.classifier).eval()
        replace_tensors(baked.model, tensors or {})
        return baked

    def own_parameters(self, start: int = 0, stop: int | None = None) -> dict[str, nn.Parameter]:
        """The parameters of a segment, by name: those of the network that `bake` keeps."""
        last = None if stop is None else self.cut(stop)
        return own_parameters(self.model, outside(self.cut(start) if start else None, last, self.classifier))

    def pieces(
        self, given: Mapping[str, Tensor] | None = None, names: Mapping[str, str | None] | None = None
    ) -> list[Piece]:
        """The network piece by piece, from cut to cut, with the SHA-256 of the weights of each.

        Args:
            given: weights in the place of its own, by name.
            names: by the names that weights are to have, those that they have now; no others then count.
        """
        known = None if names is None else {now: name for name, now in names.items()}
        found = []
        for index, cut in enumerate((*self.cuts, None)):
            tensors = {key: (given or {}).get(key, tensor) for key, tensor in self._piece_tensors(index).items()}
            if known is not None:
                tensors = {known[key]: tensor for key, tensor in tensors.items() if key in known}
            shape = cut.layout.shape(1)[1:] if cut else ()
            found.append(Piece(cut.name if cut else None, shape, weights_sha256(tensors)))
        return found

    def _piece_tensors(self, index: int) -> dict[str, Tensor]:
        stop = None if index == self.depth else self.cut(index + 1)
        return own_tensors(self.model, outside(self.cut(index), stop, None))

    def fingerprint(self) -> str:
        """Types of the weights and a SHA-256 of class, cuts and weights: equal ones mean equal networks."""
        return fingerprint(self.model, self.pieces())

    def weights(self, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor | None]:
        """Parameters and saved buffers by name, or ``given`` in their place; None for one that is not in memory."""
        own, known = own_tensors(self.model, ()), self.seal.marks.keys()
        if given and known and known <= given.keys():  # whatever a wrapper has made of the network's own
            return {key: given[key] for key in known}
        own |= {key: tensor for key, tensor in (given or {}).items() if key in own}
        return {key: None if key in self.absent else tensor for key, tensor in own.items()}

    def seal_weights(self) -> None:
        """Have `changed` tell from now on what has changed, unless it tells it already."""
        if not self.seal.marks:
            self.seal.add({key: tensor for key, tensor in self.weights().items() if tensor is not None})

    def changed(self, pieces: Sequence[Piece] | None = None, given: Mapping[str, Tensor] | None = None) -> list[str]:
        """Names of the weights that are other ones than when they were sealed, or than is expected of them.

        Args:
            pieces: what they were, in case they were not sealed.
            given: weights in the place of the network's own, by name.
        """
        unsealed = not self.seal.marks and not self._expected and pieces is not None
        found: list[str] = []
        for index, (expected, tensors) in list((self._pending(pieces or ()) if unsealed else self._expected).items()):
            if tensors.keys() & self.absent:
                continue
            tensors = {key: (given or {}).get(key, tensor) for key, tensor in tensors.items()}
            if weights_sha256(tensors) != expected:
                found += tensors
            elif not unsealed:
                self.seal.add(tensors)
                self._expected.pop(index, None)
        if unsealed and not found:
            self.seal_weights()
        found += [name for name, now in self.seal.match(self.weights(given)).items() if now is None]
        return list(dict.fromkeys(found))

    def expect(self, pieces: Sequence[Piece]) -> None:
        """Raise ValueError, when a piece first runs, if the weights it has now are other ones.

        Until then the weights of a memory-mapped file need not be read.
        """
        self._expected = self._pending(pieces)
        for _, tensors in self._expected.values():
            self.seal.add(tensors, read=False)

    def _pending(self, pieces: Sequence[Piece]) -> dict[int, tuple[str, dict[str, Tensor]]]:
        return {index: (piece.sha256, self._piece_tensors(index)) for index, piece in enumerate(pieces)}

    def verify(self, start: int = 0, stop: int | None = None) -> None:
        """Check the weights of a segment against what is expected of them.

        Raises:
            ValueError: they are other ones.
        """
        end = self.depth + 1 if stop is None else stop
        for index, (expected, tensors) in list(self._expected.items()):
            if not start <= index < end:
                continue
            found = weights_sha256(tensors)
            if found != expected:
                raise ValueError(
                    f"the weights of anchor '{self.name}' from cut {index} to {index + 1} have SHA-256 {found}; the "
                    f"adapter was made for {expected}. Load it with the right network: "
                    f"from_pretrained(..., anchors={{{self.name!r}: a module or a folder}}). Before you change them "
                    f"yourself, as merging LoRA does, call model.anchors[{self.name!r}].verify()"
                )
            self.seal.add(tensors)
            self._expected.pop(index, None)  # another thread may have been faster

    def check_present(self, start: int = 0, stop: int | None = None) -> None:
        """Raise ValueError where weights of a segment are not in memory."""
        gone = sorted(self.absent & self.own_parameters(start, stop).keys()) if self.absent else []
        if gone:
            raise ValueError(
                f"weights of anchor '{self.name}' are not in memory ({gone[0]} and {len(gone) - 1} more), since the "
                "model was pruned to other routes, or pages its weights in for the active route alone: set_route "
                "brings them back where page_to was called; else load the model again"
            )

    def extra_repr(self) -> str:
        return f"name={self.name!r}, cuts={'not searched' if self._found is None else self.depth}"


def unique_names(anchors: Iterable[Anchor]) -> None:
    """Give the second anchor of a name the suffix ``_2``, and so on; for names of attributes see `free_name`."""
    taken: set[str] = set()
    for anchor in anchors:
        anchor.name = name = free_name(anchor.name)
        number = 2
        while anchor.name in taken:
            anchor.name = f"{name}_{number}"
            number += 1
        taken.add(anchor.name)


def free_name(name: str) -> str:
    """The name, with ``_`` after it where torch has no module called so, as it is an attribute of modules."""
    while hasattr(nn.ModuleDict(), name):
        name += "_"
    return name


def largest_anchor(anchors: Iterable[Anchor]) -> Anchor:
    """The anchor with the most parameters; of several, the first."""
    return max(anchors, key=Anchor.num_parameters)
