"""PredictionMixin: prepare images in any form for a model, and name what is in them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.utils import logging

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.datasets import MULTI_LABEL, batches
from restnet_hf.data.pixel_values import check_on_error
from restnet_hf.data.prepare import Pictures, is_one_image, prepare_data
from restnet_hf.data.preprocessing import plain_processor
from restnet_hf.errors import BudgetError, PictureError
from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.profile import BudgetLike, Profile
from restnet_hf.routes.route import Route


Prediction = list[dict[str, Any]]  # labels and scores of an image, the highest score first
logger = logging.get_logger(__name__)


class PredictionMixin:
    """Methods of a stitched model that prepare images and classify them."""

    # Attributes of the model
    config: Any
    anchors: Mapping[str, Anchor]
    device: torch.device
    profiled: Profile | None
    route: Callable[[Route | str], Route]
    runnable_cascade: Callable[[Cascade | str], Cascade]
    __call__: Callable[..., Any]

    @property
    def image_processor(self) -> Any:
        """The front anchor's image processor; one made of its `Preprocessing` where it has none of its own."""
        anchor = next(iter(self.anchors.values()))
        if anchor.processor is None:
            anchor.processor = plain_processor(anchor.preprocessing)
        return anchor.processor

    def prepare_data(
        self,
        data: Any,
        *,
        name: str = "data",
        label_column: str | None = None,
        on_error: str = "raise",
        labels: bool = True,
    ) -> Any:
        """Prepare images in any form for this model; every method that takes images does so by itself.

        Pictures are prepared by `image_processor` as they are read, and labels are put into the model's order by the
        names of the classes. What is prepared already, such as tensors, loaders and data sets of `with_pixel_values`,
        is checked and returned as it is. A raw `datasets.Dataset`, a folder and a list of files keep their identity,
        so that what was computed from them is found in caches.

        Args:
            data: PIL image, path of a picture, array or tensor, or a list of these, or of pairs of one and its label;
                folder of pictures, with a subfolder for each class if they are labelled; data set or stream of
                `datasets` with a column of images; map-style data set of pictures and labels, such as torchvision's;
                DataLoader; or ``pixel_values`` (N, 3, H, W) and ``labels`` (N,) in any form that
                `restnet_hf.data.batches` takes.
            name: name of the data, for errors.
            label_column: column of labels, where there are several.
            on_error: ``raise`` to raise an error that names a broken picture when it is read; ``skip`` to leave out
                broken pictures, with a warning that counts them. All are decoded once for that: prepare the data once
                and pass on the result.
            labels: whether labels are used; if not, they are left out of pictures, and classes are not checked.

        Returns:
            Data of ``pixel_values`` and, where there are any, ``labels``.

        Raises:
            OSError: there is no such file or folder.
            ValueError: the classes are not the model's, it is not clear which column is meant, or there are no
                pictures.
        """
        options: dict[str, Any] = {"name": name, "label_column": label_column, "on_error": on_error, "labels": labels}
        return prepare_data(data, self.image_processor, self.config.id2label, **options)

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        *,
        route: Route | str | None = None,
        cascade: Cascade | str | None = None,
        budget: BudgetLike | None = None,
        top_k: int | None = 5,
        batch_size: int = 64,
        on_error: str = "raise",
    ) -> Prediction | list[Prediction]:
        """Name what is in images; nothing of a call is stored in the model, so threads can share it.

        Args:
            images: images in any form that `prepare_data` takes; their labels are not read.
            route: route to run; by default the active one, or the active cascade.
            cascade: cascade with thresholds to run in place of a route.
            budget: limits such as ``{"macs": 1e9}``; the best route or cascade of the profile within them runs, and
                the active one stays as it is.
            top_k: number of classes for each image, those with the highest scores; all if None.
            batch_size: number of images in a batch.
            on_error: ``raise`` to raise an error for a broken picture, or ``skip`` to give it an empty list.

        Returns:
            For one image a list of ``{"label": name, "score": probability}``, the highest first; for several a list of
            such lists. Probabilities add up to 1, or are each class's own where ``problem_type`` is
            ``multi_label_classification``.

        Raises:
            BudgetError: no route fits the budget, or the model was not profiled.
            ValueError: a picture is broken, or an option is out of range.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1, or None for all classes")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        chosen = self._chosen_for(route, cascade, budget)
        results: list[Prediction] = []
        for pixel_values, kept in self._read(images, batch_size, on_error):
            named = iter(self._name(pixel_values, chosen, top_k) if any(kept) else ())
            results += [next(named) if readable else [] for readable in kept]
        return results[0] if is_one_image(images) else results

    def _chosen_for(
        self, route: Route | str | None, cascade: Cascade | str | None, budget: BudgetLike | None
    ) -> Route | Cascade | None:
        """The route or cascade of a call; None for the active one."""
        if sum(each is not None for each in (route, cascade, budget)) > 1:
            raise ValueError("give one of route, cascade and budget")
        if cascade is not None:
            return self.runnable_cascade(cascade)
        if budget is None:
            return None if route is None else self.route(route)
        if self.profiled is None:
            raise BudgetError("the costs of the routes are not known yet; call profile() first")
        return self.profiled.best(budget).route

    def _read(self, images: Any, batch_size: int, on_error: str) -> Iterator[tuple[Tensor, list[bool]]]:
        """Batches of images (N, 3, H, W) that can be read, and whether each image of the batch is one of them."""
        check_on_error(on_error)
        data = self.prepare_data(images, name="images", labels=False)
        if on_error == "raise" or not isinstance(data, Dataset | Pictures):
            data = self.prepare_data(data, name="images", labels=False, on_error=on_error)
            for batch in batches(data, batch_size, "images", progress=False):
                yield batch["pixel_values"], [True] * len(batch["pixel_values"])
            return
        errors: list[str] = []
        for start in range(0, len(data), batch_size):
            read: list[Tensor | None] = []
            for index in range(start, min(start + batch_size, len(data))):
                try:
                    read.append(data[index]["pixel_values"])
                except PictureError as error:
                    errors.append(str(error))
                    read.append(None)
            readable = [image for image in read if image is not None]
            yield torch.stack(readable) if readable else torch.empty(0), [image is not None for image in read]
        if errors:
            logger.warning(f"{len(errors)} of {len(data)} pictures have no prediction: {errors[0]}")

    def _name(self, pixel_values: Tensor, chosen: Route | Cascade | None, top_k: int | None) -> list[Prediction]:
        """Labels and scores of images (N, 3, H, W) by a route or cascade."""
        kind = "cascade" if isinstance(chosen, Cascade) else "route"
        logits = self(pixel_values.to(self.device), **{kind: chosen}).logits.float()
        many = self.config.problem_type == MULTI_LABEL
        scores = logits.sigmoid() if many else logits.softmax(-1)
        best = scores.topk(min(top_k or scores.shape[-1], scores.shape[-1]))
        names = self.config.id2label
        return [
            [{"label": names[index], "score": score} for index, score in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
