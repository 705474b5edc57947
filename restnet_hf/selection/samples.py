"""Samples of anchors' activations from one pass, to fit and test stitches and probes on."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, log_softmax, one_hot, softmax

from restnet_hf.anchors.anchor import Anchor, largest_anchor
from restnet_hf.distributed import own_items, share_jobs
from restnet_hf.progress import progress_bar
from restnet_hf.stitches.layers import Problem, Stitch, StitchConfig, make_stitch
from restnet_hf.stitches.precision import in_full_precision, trained_dtype


POSITIONS = 4  # of every map, drawn at random for each image
TEST_BATCH = 64  # images that are tested at a time


@dataclass(frozen=True)
class Pair:
    """Two anchors that may be joined.

    Args:
        front: anchor whose activations stitches take.
        end: anchor whose activations stitches replace.
        finish: function from the end's output to the model's logits: a new head, an order of labels, or identity.
        config: options of the stitches.
    """

    front: Anchor
    end: Anchor
    finish: Callable[[Tensor], Tensor]
    config: StitchConfig = field(default_factory=StitchConfig)

    @property
    def names(self) -> tuple[str, str]:
        """Names of the front and the end."""
        return self.front.name, self.end.name


class SelectionBatch:
    """One batch of images for all anchors that are compared.

    Args:
        start: index of the first image in the whole data.
        images: images (N, 3, H, W) by anchor name, each anchor's in its own preprocessing.
        anchors: mapping from names to anchors.
        finish: functions from each anchor's output to the model's logits, by name.
        labels: labels (N,); None if there are none.
    """

    def __init__(
        self,
        start: int,
        images: Mapping[str, Tensor],
        anchors: Mapping[str, Anchor],
        finish: Mapping[str, Callable[[Tensor], Tensor]],
        labels: Tensor | None = None,
    ) -> None:
        self.start, self.images, self.labels = start, images, labels
        self.size = len(next(iter(images.values())))
        self._anchors, self._finish = anchors, finish
        self._last: dict[str, Tensor] = {}
        self._computed: dict[Hashable, Tensor] = {}

    def run(self, hook: Callable[[Anchor, int, Tensor], None]) -> None:
        """Run each anchor once; only its last activation is kept.

        Args:
            hook: function that is called with an anchor, a cut and the activation there, for every cut.
        """
        for name, anchor in self._anchors.items():

            def record(cut: int, activation: Tensor, anchor: Anchor = anchor) -> None:
                hook(anchor, cut, activation)
                if cut == anchor.depth:
                    self._last[anchor.name] = activation

            anchor.capture(self.images[name], _cuts(anchor), see=record)

    def compute_once(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """The result of a function, which the selectors of all pairs share.

        Args:
            key: everything that the result depends on besides the batch.
            function: function that computes the result.
        """
        if key not in self._computed:
            self._computed[key] = function()
        return self._computed[key]

    @cached_property
    def logits(self) -> dict[str, Tensor]:
        """Logits (N, classes) of each anchor alone, in the model's classes; after `run`."""
        ends = {name: anchor(self._last[name], anchor.depth) for name, anchor in self._anchors.items()}
        return {name: self._finish[name](end) for name, end in ends.items()}


@dataclass(frozen=True)
class Solution:
    """Solution of a least-squares problem.

    Args:
        weight: weight (D, C) of the affine map.
        bias: bias (D,) of the affine map.
        r2: R² on the held-out images.
    """

    weight: Tensor
    bias: Tensor
    r2: float


class SampleStore:
    """Samples of the activations of all anchors on the first images, kept once and shared by all pairs.

    Nothing is kept before a selector asks for it, and the memory does not grow with the data.

    Args:
        images: number of images to keep samples of.
    """

    def __init__(self, images: int = 512) -> None:
        self.images = images
        self.anchors: dict[str, Anchor] = {}
        self.chunks: list[dict[Any, Tensor]] = []
        self.pooled: set[str] = set()  # anchors whose activations are kept as means over positions
        self.fronts: set[str] = set()  # anchors in whose preprocessing held-out images are kept
        self.readers: dict[tuple[str, int], dict[Hashable, tuple[Problem, Any]]] = {}
        self.probes: dict[Hashable, list[Tensor]] = {}
        self._chunk: dict[Any, Tensor] = {}

    @property
    def wanted(self) -> bool:
        """Whether a selector has asked for anything."""
        return bool(self.readers or self.pooled)

    @property
    def labelled(self) -> bool:
        """Whether all kept images have labels."""
        return bool(self.chunks) and all("labels" in chunk for chunk in self.chunks)

    def read(self, anchor: Anchor, cut: int, activation: Tensor, batch: SelectionBatch) -> None:
        """Take samples of one activation of a batch."""
        n = min(batch.size, self.images - batch.start)
        if n <= 0 or not self.wanted:
            return
        if anchor.name in self.pooled:
            spatial = anchor.layout(cut).split(activation[:n])[0]
            self._chunk["pooled", anchor.name, cut] = _finite(spatial.mean((2, 3)), anchor, cut)
        for key, (problem, rows) in self.readers.get((anchor.name, cut), {}).items():
            chosen = problem.chosen(n, POSITIONS, batch.start)
            self._chunk[key] = _finite(rows(activation[:n], chosen), anchor, cut)

    def update(self, batch: SelectionBatch) -> None:
        """Finish a batch after all of its activations were read."""
        n = min(batch.size, self.images - batch.start)
        if n <= 0 or not self.wanted:
            return
        chunk, self._chunk = self._chunk, {}
        chunk["number"] = torch.arange(batch.start, batch.start + n)
        chunk |= {("logits", name): logits[:n].float().cpu() for name, logits in batch.logits.items()}
        if batch.labels is not None:
            chunk["labels"] = batch.labels[:n].cpu()
        held: dict[int, Tensor] = {}  # anchors of equal preprocessing have the same images
        for name in sorted(self.fronts):
            images = batch.images[name][:n]
            mask = (chunk["number"] % 2 == 1).to(images.device)
            chunk["images", name] = held.setdefault(images.data_ptr(), images[mask].cpu())
        self.chunks.append(chunk)

    def state(self) -> list[dict[Any, Tensor]]:
        """The samples of this process."""
        return self.chunks

    def merge(self, states: Iterable[list[dict[Any, Tensor]]]) -> None:
        """Merge the samples of all processes."""
        self.chunks = sorted((c for state in states for c in state), key=lambda chunk: int(chunk["number"][0]))

    def all(self, key: Hashable) -> Tensor:
        """One kind of sample of all kept images.

        Args:
            key: key of the samples in a chunk.

        Raises:
            ValueError: there are no images.
        """
        if not self.chunks:
            raise ValueError("there were no images to fit anything on")
        return torch.cat([chunk[key] for chunk in self.chunks])


class Samples:
    """Samples of both anchors' activations on the first images; every other image is held out for tests.

    Args:
        pair: front and end anchor, and options of stitches.
        images: number of images to keep samples of.
        store: samples of several pairs, of which this is one; by default those of this pair alone.
    """

    def __init__(self, pair: Pair, images: int = 512, store: SampleStore | None = None) -> None:
        self.pair = pair
        self.store = SampleStore(images) if store is None else store
        self.store.anchors |= {anchor.name: anchor for anchor in (pair.front, pair.end)}
        self.problems: dict[tuple[int, int], list[Problem]] = {}
        self.read, self.update = self.store.read, self.store.update

    @property
    def chunks(self) -> list[dict[Any, Tensor]]:
        """The samples, by batch."""
        return self.store.chunks

    def keep_rows(self) -> None:
        """Keep activations at a few positions of each image, to fit stitches on."""
        if not self.problems:
            front, end = self.pair.front, self.pair.end
            front.search()
            end.search()
            with torch.device("meta"):  # only shapes are needed
                stitches = {(i, j): self._stitch(i, j) for i in _cuts(front) for j in _cuts(end)}
            self.problems = {cuts: stitch.problems() for cuts, stitch in stitches.items()}
            for (i, j), problems in self.problems.items():
                readers = (self.store.readers.setdefault(place, {}) for place in ((front.name, i), (end.name, j)))
                inputs, outputs = readers
                for problem in problems:
                    inputs[self._key("in", i, problem.key_in)] = problem, problem.inputs
                    outputs[self._key("out", j, problem.key_out)] = problem, problem.outputs

    def _key(self, side: str, cut: int, key: Hashable) -> Hashable:
        """The key of rows of the front (``in``) or the end (``out``), which pairs with the same anchor share."""
        return side, (self.pair.front if side == "in" else self.pair.end).name, cut, key

    def keep_pooled(self) -> None:
        """Keep each activation's mean over positions."""
        self.store.pooled |= {self.pair.front.name, self.pair.end.name}

    def keep_images(self) -> None:
        """Keep the held-out images themselves."""
        self.store.fronts.add(self.pair.front.name)

    def _stitch(self, i: int, j: int) -> Stitch:
        return make_stitch(self.pair.front.layout(i), self.pair.end.layout(j), self.pair.config)

    def rows(self, side: str, cut: int, key: Hashable) -> Tensor:
        """Rows (N, P, C) of a least-squares problem.

        Args:
            side: ``in`` for the front, ``out`` for the end.
            cut: number of the cut.
            key: key of the problem's rows on that side.
        """
        return self.store.all(self._key(side, cut, key))

    @property
    def held(self) -> Tensor:
        """Which of the kept images are held out (N,), as booleans."""
        held = self.store.all("number") % 2 == 1
        if not held.any():
            raise ValueError("at least 2 images are needed, one to fit on and one to test on")
        return held

    @property
    def own_cuts(self) -> list[int]:
        """The cuts of the front whose stitches this process solves and tests; those of all processes are all cuts."""
        return list(own_items(_cuts(self.pair.front)))

    @property
    def labelled(self) -> bool:
        """Whether all kept images have labels."""
        return self.store.labelled

    def settings(self) -> dict[str, Any]:
        """Number of sampled images, and of those held out."""
        held = self.held
        return {"images": len(held), "held_out": int(held.sum())}

    def solve(
        self, ridge: float, cuts: Iterable[int] | None = None
    ) -> Iterator[tuple[tuple[int, int], list[Solution]]]:
        """Solve the problems of the stitch of each pair of cuts on the samples.

        Args:
            ridge: regularisation relative to the mean variance of the features.
            cuts: cuts of the front whose stitches are solved; all by default.
        """
        held = self.held
        for i in progress_bar(_cuts(self.pair.front) if cuts is None else cuts, "stitches"):
            problems = [
                (j, number, p) for (k, j), ps in self.problems.items() if k == i for number, p in enumerate(ps)
            ]
            solved: dict[tuple[int, int], Solution] = {}
            for key in dict.fromkeys(problem.key_in for _, _, problem in problems):
                same = [(j, number, problem) for j, number, problem in problems if problem.key_in == key]
                outputs = [self.rows("out", j, problem.key_out) for j, _, problem in same]
                solutions = _regress(self.rows("in", i, key), outputs, held, ridge)
                solved |= {(j, number): solution for (j, number, _), solution in zip(same, solutions, strict=True)}
            for j in _cuts(self.pair.end):
                yield (i, j), [solved[j, number] for number in range(len(self.problems[i, j]))]

    def stitches(self, ridge: float, cuts: Iterable[int] | None = None) -> dict[tuple[int, int], Stitch]:
        """The fitted stitch of every pair of cuts.

        Args:
            ridge: regularisation relative to the mean variance of the features.
            cuts: cuts of the front whose stitches are fitted; all by default.
        """
        like, stitches = next(self.pair.end.parameters()), {}
        for (i, j), solutions in self.solve(ridge, cuts):
            stitch = self._stitch(i, j).to(like.device, trained_dtype(like.dtype)).eval()
            for problem, solution in zip(stitch.problems(), solutions, strict=True):
                problem.assign(solution.weight, solution.bias)
            stitches[i, j] = stitch
        return stitches

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the held-out images, in the front's preprocessing, and their right classes (N,)."""
        images, held, right = self.store.all(("images", self.pair.front.name)), self.held, self._right()
        device = next(self.pair.end.parameters()).device
        for batch, answers in zip(images.split(TEST_BATCH), right[held].split(TEST_BATCH), strict=True):
            yield batch.to(device, non_blocking=True), answers.to(device)

    def accuracy(self, anchor: Anchor) -> float:
        """Accuracy of an anchor alone on the held-out images, from 0 to 1.

        Args:
            anchor: anchor at the front or at the end.
        """
        predicted = self.store.all(("logits", anchor.name))[self.held].argmax(-1)
        return (predicted == self._right()[self.held]).double().mean().item()

    def _right(self) -> Tensor:
        """The right class of each image (N,): its label or, without labels, what the largest anchor predicts."""
        return self.store.all("labels") if self.labelled else self._teacher().argmax(-1)

    def _teacher(self) -> Tensor:
        return self.store.all(("logits", largest_anchor(self.store.anchors.values()).name))

    def log_probabilities(self, anchor: Anchor) -> Tensor:
        """Log-probabilities (N, classes) of the anchor itself on the held-out images."""
        return log_softmax(self.store.all(("logits", anchor.name))[self.held], dim=-1)

    def probes(self, anchor: Anchor, weight_decay: float) -> list[Tensor]:
        """Log-probabilities (N, classes) of a linear probe on the held-out images, for each cut.

        Probes learn the labels or, without labels, the outputs of the largest anchor. They are trained once for all
        pairs with the anchor, and processes share the cuts.

        Args:
            anchor: anchor whose activations the probes take.
            weight_decay: weight decay of the probes.

        Raises:
            ValueError: there are fewer than three images.
        """
        if (known := self.store.probes.get((anchor.name, weight_decay))) is not None:
            return known
        held, teacher = self.held, self._teacher()
        if (count := len(held)) < 3:
            raise ValueError(
                f"{count} images came, and probes need 3: two to learn on and one to test; give some hundreds"
            )
        targets = (
            one_hot(self.store.all("labels").long(), teacher.shape[1]).float()
            if self.labelled
            else softmax(teacher, -1)
        )

        def probe(number: int) -> Tensor:
            x = self.store.all(("pooled", anchor.name, number + 1)).float()
            x = (x - x[~held].mean(0)) / x[~held].std(0).clamp_min(1e-6)
            weight, bias = _softmax_regression(x[~held].to(targets.device), targets[~held], weight_decay)
            bar.update()
            return log_softmax(in_full_precision(linear)(x[held], weight.T, bias), dim=-1)

        with progress_bar(desc=f"probes of {anchor.name}", total=len(list(own_items(_cuts(anchor))))) as bar:
            self.store.probes[anchor.name, weight_decay] = share_jobs(probe, anchor.depth)
        return self.store.probes[anchor.name, weight_decay]


def _cuts(anchor: Anchor) -> range:
    return range(1, anchor.depth + 1)


def not_finite(anchor: Anchor, cut: int) -> ValueError:
    """The error of activations that hold NaN or infinite values."""
    name = anchor.cuts[cut - 1].name
    return ValueError(f"activations of '{anchor.name}' at cut {cut} ({name}) hold NaN or infinite values")


def _finite(x: Tensor, anchor: Anchor, cut: int) -> Tensor:
    x = x.float().cpu()
    if not x.isfinite().all():
        raise not_finite(anchor, cut)
    return x


@in_full_precision
def _regress(x: Tensor, ys: list[Tensor], held: Tensor, ridge: float) -> list[Solution]:
    """Affine regression of each of several rows (N, P, D) on rows (N, P, C), with R² on the held-out images."""
    (fit, test), c = (x[mask].flatten(0, 1).double() for mask in (~held, held)), x.shape[2]
    mean = fit.mean(0)
    fit, test = (fit - mean).float(), (test - mean).float()
    y = torch.cat([each[~held].flatten(0, 1) for each in ys], dim=1).double()
    y_mean = y.mean(0)
    y = (y - y_mean).float()
    weight = _ridge(fit, y, ridge) if c else y.new_zeros(0, y.shape[1])
    outputs, solutions, start = test @ weight, [], 0
    for each in ys:
        part = slice(start, start + each.shape[2])
        truth = (each[held].flatten(0, 1).double() - y_mean[part]).float()
        total = truth.square().sum().item()
        r2 = 1 - (truth - outputs[:, part]).square().sum().item() / total if total else 1.0
        bias = y_mean[part] - (mean @ weight[:, part].double() if c else 0)
        solutions.append(Solution(weight[:, part].T, bias, r2))
        start = part.stop
    return solutions


def _ridge(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Weight (C, D) of the centred rows; by the smaller of the two systems of equations."""
    wide = x.shape[1] > x.shape[0]
    matrix = x @ x.T if wide else x.T @ x
    scale = x.square().sum() / x.shape[1]
    if not scale > 0:
        return x.new_zeros(x.shape[1], y.shape[1])
    factor, failed = torch.linalg.cholesky_ex(matrix + ridge * scale * torch.eye(len(matrix), device=x.device))
    if failed:
        return _ridge(x, y, 10 * ridge)
    return x.T @ torch.cholesky_solve(y, factor) if wide else torch.cholesky_solve(x.T @ y, factor)


@in_full_precision
def _softmax_regression(x: Tensor, targets: Tensor, weight_decay: float) -> tuple[Tensor, Tensor]:
    """Weight (C, classes) and bias of multinomial logistic regression on (soft) targets (N, classes)."""
    weight = x.new_zeros(x.shape[1], targets.shape[1], requires_grad=True)
    bias = x.new_zeros(targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(x @ weight + bias, targets) + weight_decay * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()
