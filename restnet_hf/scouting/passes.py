"""One pass of each of many anchors over the same images, with samples in caches on disk that all pairs share."""

import hashlib
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.datasets import data_fingerprint
from restnet_hf.data.shares import shared_batches
from restnet_hf.distributed import this_process
from restnet_hf.hashing import software_sha256
from restnet_hf.modeling_restnet import StitchedModelForImageClassification
from restnet_hf.selection.cache import CODE, LIBRARIES
from restnet_hf.selection.pairs import choose_pairs
from restnet_hf.selection.samples import Pair, Samples, SampleStore, SelectionBatch
from restnet_hf.stitches.layers import StitchConfig
from restnet_hf.training.feature_cache import FeatureCache, Spec


BATCH_SIZE = 64  # images of a batch, by which the sampled positions are drawn
IMAGES, LABELS, LOGITS = "pixel_values", "labels", "logits"  # names in the caches


class AnchorPasses(SampleStore):
    """Samples of the activations of all anchors of a model, each from one pass, on disk.

    The images are read and prepared once. An anchor runs over them once, and what any pair needs of it is then in a
    cache of its own, which a later run on the same images reads instead. Pairs and their selectors read the samples
    as those of any `SampleStore`. Samples are taken of the first images, of which those of odd number are held out;
    the images behind these are held out too, and of them only logits are kept.

    Args:
        model: model of all anchors.
        pictures: labelled images from `cache_pictures`.
        folder: folder of the caches.
        order: directions of the pairs; see `choose_pairs`.
        sampled: number of images, the first ones, that samples are taken of; all by default.
    """

    def __init__(
        self,
        model: StitchedModelForImageClassification,
        pictures: FeatureCache,
        folder: str | os.PathLike[str],
        order: str = "given",
        sampled: int | None = None,
    ) -> None:
        super().__init__(len(pictures) if sampled is None else sampled)
        self.model, self.pictures, self.folder = model, pictures, Path(folder)
        self._identities = self._identify_anchors()
        self._caches: dict[str, FeatureCache] = {}
        by_size = sorted(model.anchors, key=lambda name: -model.anchors[name].num_parameters())
        self.pairs: dict[tuple[str, str], Samples] = {}
        for front, end in choose_pairs(by_size, order=order):
            pair = Pair(model.anchors[front], model.anchors[end], model.finish(end), StitchConfig())
            self.pairs[front, end] = Samples(pair, store=self)
            self.pairs[front, end].keep_rows()

    def _identify_anchors(self) -> dict[str, dict[str, Any]]:
        """What the samples of each anchor depend on, fit for JSON."""
        identity = self.model.identity()
        own = {entry["name"]: entry for entry in identity["anchors"]}
        heads = {name: identity["heads"].get(f"heads.{name}") for name in own}
        rest = {key: value for key, value in identity.items() if key not in ("anchors", "heads")}
        rest |= {"images": self.pictures.identity, "sampled": self.images}
        order = list(self.model.config.id2label.values())
        return {name: {"anchor": own[name], "head": heads[name], "classes": order, **rest} for name in own}

    def cache(self, anchor: str) -> FeatureCache:
        """The cache of the samples of an anchor.

        Args:
            anchor: name of the anchor.
        """
        if anchor not in self._caches:
            self._caches[anchor] = FeatureCache(self.folder, self._identities[anchor], self.images)
        return self._caches[anchor]

    def logits_cache(self, anchor: str) -> FeatureCache:
        """The cache of the logits of an anchor, of all images.

        Args:
            anchor: name of the anchor.
        """
        return FeatureCache(self.folder, {**self._identities[anchor], "of": LOGITS}, len(self.pictures))

    def needed(self, anchor: str) -> dict[Hashable, str]:
        """The names in the cache of all samples that the pairs need of an anchor, by key; logits are not among them.

        Args:
            anchor: name of the anchor.
        """
        keys = [key for place, readers in self.readers.items() if place[0] == anchor for key in readers]
        return {key: _file_name(key) for key in keys}

    def run(self, anchor: str) -> bool:
        """Run an anchor once over all images and write its samples and logits; returns whether it had to run.

        Where an earlier run wrote the logits already, it runs over the images alone that samples are taken of.

        Args:
            anchor: name of the anchor.

        Raises:
            ValueError: an activation is not finite (named).
            OSError: the disk is too small.
        """
        cache, logits, names = self.cache(anchor), self.logits_cache(anchor), self.needed(anchor)
        missing, lacking = set(cache.missing(names.values())), logits.missing([LOGITS])
        if not missing and not lacking:
            return False
        wanted = {key: name for key, name in names.items() if name in missing}
        chunks = self._chunks(anchor, wanted, len(self.pictures) if lacking else self.images)
        first = next(chunks)
        with ExitStack() as stack:
            writer = stack.enter_context(cache.write(_specs(first[1]))) if first[1] else None
            logits_writer = stack.enter_context(logits.write(_specs(first[2]))) if lacking else None
            for start, samples, ends in chain([first], chunks):
                if writer and samples:
                    writer.put(start, samples)
                if logits_writer:
                    logits_writer.put(start, ends)
        return True

    @torch.no_grad()
    def _chunks(
        self, anchor: str, names: dict[Hashable, str], images: int
    ) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
        """The number of the first image of each batch, the samples of an anchor by name, and its logits."""
        part = SampleStore(self.images)
        part.readers = {place: readers for place, readers in self.readers.items() if place[0] == anchor}
        for batch in self.model.selection_batches(self.pictures, BATCH_SIZE, [anchor], images):
            batch.run(partial(_read, part, batch))
            part.update(batch)
            chunk = part.chunks.pop() if part.chunks else {}
            samples = {names[key]: rows for key, rows in chunk.items() if key in names}
            yield batch.start, samples, {LOGITS: batch.logits[anchor].float().cpu()}

    def all(self, key: Hashable) -> Tensor:
        """One kind of sample of all images that samples are taken of, from the cache.

        Args:
            key: key of the samples; ``number`` and ``labels`` are those of the images.

        Raises:
            ValueError: the pass that gives the samples was not made.
        """
        if key == "number":
            return torch.arange(self.images)
        if key == LABELS:
            return self.labels[: self.images]
        assert isinstance(key, tuple)
        if key[0] == "images":
            return self.model.images_for(key[1], self.held_images)
        if key[0] == "logits":
            return self.logits(key[1])[: self.images]
        return self.cache(key[1]).rows(_file_name(key))

    @property
    def labelled(self) -> bool:
        """Whether all images have labels, which is so."""
        return True

    @cached_property
    def labels(self) -> Tensor:
        """The class of each image (N,), by number in the model."""
        return self.pictures.rows(LABELS)

    def logits(self, anchor: str) -> Tensor:
        """Logits (N, classes) of an anchor on all images.

        Args:
            anchor: name of the anchor.

        Raises:
            ValueError: its pass was not made.
        """
        return self.logits_cache(anchor).rows(LOGITS)

    @cached_property
    def held_images(self) -> Tensor:
        """The held-out images (N, 3, H, W), of those that samples are taken of, in the model's preprocessing."""
        return torch.cat([batch[IMAGES] for batch in self.batches(range(1, self.images, 2))])

    @property
    def held_numbers(self) -> list[int]:
        """Numbers of all held-out images, those first that samples are taken of."""
        return [*range(1, self.images, 2), *range(self.images, len(self.pictures))]

    def batches(self, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Batches of some images and their labels, in the model's preprocessing, read from disk one by one.

        Args:
            numbers: numbers of the images.
        """
        for start in range(0, len(numbers), BATCH_SIZE):
            items = self.pictures.__getitems__(numbers[start : start + BATCH_SIZE])
            yield {name: torch.stack([item[name] for item in items]) for name in (IMAGES, LABELS)}


def _specs(rows: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Shape and type of one row of each tensor."""
    return {name: (tuple(each.shape[1:]), each.dtype) for name, each in rows.items()}


def _read(store: SampleStore, batch: SelectionBatch, anchor: Anchor, cut: int, activation: Tensor) -> None:
    """Take samples of an anchor's activation at a cut."""
    store.read(anchor, cut, activation, batch)


def _file_name(key: Any) -> str:
    """A name of a file for a key of samples, in which the anchor is left out."""
    side, _, cut, rows = key
    text = re.sub(r"[^A-Za-z0-9]+", "-", repr(rows)).strip("-")[:60]
    return f"{side}-{cut}-{text}-{hashlib.sha256(repr(rows).encode()).hexdigest()[:6]}"


def cache_pictures(
    model: StitchedModelForImageClassification, data: Dataset, folder: str | os.PathLike[str]
) -> FeatureCache:
    """Read and prepare labelled images once, unless that is done; anchors run on what is then on disk.

    Args:
        model: model of all anchors.
        data: labelled images that ``with_pixel_values`` prepared for the model.
        folder: folder of the cache.

    Returns:
        Images ``pixel_values`` and ``labels`` by number.

    Raises:
        ValueError: the images have no labels.
        OSError: the disk is too small.
    """
    state, size = this_process(), model.preprocessing.image_size
    identity = {"images": data_fingerprint(data), "software": software_sha256(LIBRARIES, CODE)}
    identity["seen"] = str(model.preprocessing)
    cache = FeatureCache(folder, identity, len(data))
    specs: dict[str, Spec] = {IMAGES: ((3, *size), torch.float32), LABELS: ((), torch.int64)}
    run: dict[str, Any] = {"main": state.is_main_process, "barrier": state.wait_for_everyone}
    with cache.turn(specs, **run) as missing:
        if missing:
            with cache.write({name: specs[name] for name in missing}, **run) as rows:
                for _, start, batch in shared_batches(data, BATCH_SIZE, "images"):
                    if LABELS not in batch:
                        raise ValueError("the images have no labels, and accuracy decides between pairs; give some")
                    rows.put(start, {name: batch[name] for name in missing})
    return cache.select(specs)
