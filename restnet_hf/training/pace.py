"""Pace: how far a training is, by steps or by time, and the learning rate that belongs to it."""

import math
import time

import torch
from accelerate import Accelerator


SLACK = 1.5  # a step may take so many times as long as the slowest so far
LEAST_EVALUATIONS, MOST_EVALUATIONS = 4, 20
EVALUATING = 0.1  # share of a limited time that evaluations before the last may take


class Pace:
    """Counts steps and seconds of a training, and tells when to evaluate and when to stop; equal in all processes.

    Args:
        total: largest number of steps.
        seconds: largest number of seconds, from ``began`` on; None for no limit.
        began: value of `time.perf_counter` from which seconds count.
        warmup: share of the steps in which the learning rate rises.
        epochs: number of epochs, for the number of evaluations.
        accelerator: accelerator whose processes must agree on the time.
    """

    def __init__(
        self, total: int, seconds: float | None, began: float, warmup: float, epochs: int, accelerator: Accelerator
    ) -> None:
        self.total, self.seconds, self.began, self.accelerator = total, seconds, began, accelerator
        self.warmup = int(warmup * total) / total
        self.warmup = warmup if seconds is not None else self.warmup
        self.wanted_evaluations = min(max(epochs, LEAST_EVALUATIONS), MOST_EVALUATIONS)
        self.progress = 0.0
        self.before = 0.0  # seconds of earlier runs, before a resumed one
        self.start = self.first = 0.0  # share of the time that had passed at the first step, and progress then
        self.slowest = self.evaluation = 0.0  # seconds of the slowest step, and of an evaluation
        self._latest: float | None = None

    def elapsed(self) -> float:
        """Seconds that the training has taken; those of the slowest process."""
        return self._agreed(self.before + time.perf_counter() - self.began)

    def _agreed(self, seconds: float) -> float:
        """The most seconds of any process, where time decides."""
        if self.accelerator.num_processes == 1 or self.seconds is None:
            return seconds
        every = self.accelerator.gather(torch.tensor([seconds], device=self.accelerator.device))
        return float(every.max())

    def begin(self, step: int, progress: float = 0.0) -> None:
        """Begin with the steps.

        Args:
            step: number of steps done.
            progress: share of the training that an earlier run has done.
        """
        self.start, self.first = self._share(self.elapsed()), progress
        self.progress = max(progress, step / self.total)
        self._latest = None

    def update(self, step: int) -> None:
        """Count a step.

        Args:
            step: number of steps done.
        """
        now = self.elapsed()
        if self._latest is not None:
            self.slowest = max(self.slowest, now - self._latest)
        self._latest = now
        by_time = (self._share(now) - self.start) / max(1 - self.start, 1e-9)
        self.progress = min(1.0, max(step / self.total, self.first + (1 - self.first) * by_time))

    def evaluated(self, seconds: float) -> None:
        """Count an evaluation, which is no part of a step.

        Args:
            seconds: seconds that it took.
        """
        self.evaluation = max(self.evaluation, self._agreed(seconds))
        self._latest = None

    def _share(self, elapsed: float) -> float:
        """Share of the time for steps that has passed."""
        if self.seconds is None:
            return 0.0
        return elapsed / max(self.seconds - SLACK * (self.slowest + self.evaluation), 1e-9)

    @property
    def over(self) -> bool:
        """Whether no step is left."""
        return self.progress >= 1

    @property
    def evaluations(self) -> int:
        """Number of evaluations, the last one included; fewer where they would take much of a limited time."""
        if self.seconds is None or not self.evaluation:
            return self.wanted_evaluations
        return min(self.wanted_evaluations, 1 + int(EVALUATING * self.seconds / self.evaluation))

    @property
    def evaluation_number(self) -> int:
        """Number of evaluations that are due so far."""
        return int(self.progress * self.evaluations + 1e-9)

    def rate(self, _: int = 0) -> float:
        """The learning rate of the next step as a share of the highest: a linear rise, then a cosine to zero."""
        if self.progress < self.warmup:
            return self.progress / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (self.progress - self.warmup) / (1 - self.warmup)))
