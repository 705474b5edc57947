"""Accuracy as a metric of evaluate; imported only when needed, as evaluate takes a second to import."""

from typing import Any

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, as an ``evaluate`` metric that needs no network.

    ``Accuracy().compute(predictions=[0, 1], references=[0, 0])`` gives ``{"accuracy": 0.5}``.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: class indices",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
