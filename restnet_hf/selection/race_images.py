"""The images of a race, and what frozen anchors compute for them."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.progress import progress_bar


BATCH = 64


class RaceImages:
    """The images of a race, and what the frozen anchors compute for them.

    Args:
        model: model whose anchors race.
        images: images in the model's preprocessing (N, 3, H, W).
        right: right class of each image (N,).
        places: front anchors and cuts whose activations are needed.
        ends: anchors whose final features are needed.
        most: largest number of bytes of activations to keep in memory.
    """

    def __init__(
        self, model: Any, images: Tensor, right: Tensor, places: set[tuple[str, int]], ends: set[str], most: float
    ) -> None:
        self.model, self.images, self.right = model, images, right
        size = images.element_size() * len(images)
        bytes_of = (math.prod(model.anchors[name].layout(cut).shape(1)) * size for name, cut in places)
        self.kept = self._compute(places) if sum(bytes_of) <= most else None
        self.goals = {name: self._final(model.anchors[name]) for name in sorted(ends)}
        self.scales = {name: goal.var(0).mean().clamp_min(1e-12) for name, goal in self.goals.items()}

    @torch.no_grad()
    def _activations(self, images: Tensor, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
        """Activations of some images at some cuts, each anchor run once."""
        wanted: dict[str, set[int | None]] = {}
        for name, cut in places:
            wanted.setdefault(name, set()).add(cut)
        found: dict[tuple[str, int], Tensor] = {}
        for name, cuts in wanted.items():
            anchor = self.model.anchors[name]
            captured = anchor.capture(self.model.images_for(name, images), cuts)
            found |= {(name, cut): captured[cut] for cut in cuts if cut is not None}
        return found

    def _compute(self, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
        parts = [self._activations(part, places) for part in progress_bar(self.images.split(BATCH), "fronts")]
        return {place: torch.cat([part[place] for part in parts]) for place in places}

    @torch.no_grad()
    def _final(self, anchor: Anchor) -> Tensor:
        """Final features (N, D) of an anchor itself."""
        parts = (self.model.images_for(anchor.name, part) for part in self.images.split(BATCH))
        return torch.cat([anchor.capture(part, {None}, features=True)[None].float() for part in parts])

    def batches(
        self, places: Iterable[tuple[str, int]], order: Tensor
    ) -> Iterator[tuple[dict[tuple[str, int], Tensor], Tensor]]:
        """Batches of activations by place, and the indices of their images.

        Args:
            places: front anchors and cuts.
            order: indices of the images.
        """
        places = set(places)
        for indices in order.split(BATCH):
            if self.kept is None:
                yield self._activations(self.images[indices], places), indices
            else:
                yield {place: self.kept[place][indices] for place in places}, indices
