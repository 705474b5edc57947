"""Watch how many images go on in a cascade: whether it is as calibrated, and what it makes of mean costs. No torch."""

import math
from collections import deque
from collections.abc import Sequence

from restnet_hf.routes.profile import MEANS, Profile, ProfiledCascade


BLOCK, ALARM = 1000, 1e-3  # in so many images noise is taken for a change with at most such a probability
BLOCKS = (100, 300, BLOCK)  # images after which counts begin anew: a long calm must not hide a change
RECENT = 300  # images, the latest, that a new level is estimated from at most, and after which it is again
DOUBT, NEAR = 20.0, 1.0  # evidence below which a level is as calibrated, within so many standard deviations
SURE = 4.0  # standard deviations within which calibrated shares are, but once in 16,000 times
MOST_SHIFT = 20.0  # of log-odds: beyond, all images or none go on


class ShareWatch:
    """Notices when the share of images that go on is not that of the calibration, and estimates what it is.

    A harder day is taken to add the same number to the log-odds with which an image goes on, whatever the cascade and
    the stage: ``shift``. A change of it is noticed by a test that may be looked at after every image: the evidence is
    the likelihood of what went on, mixed over all shares, against the highest within the errors of the expected share.
    By Ville's inequality noise takes it above a bound with at most one over that bound as probability; several counts,
    which begin anew after 100, 300 and 1,000 images, share ``ALARM`` (Robbins 1970; Waudby-Smith and Ramdas, arXiv
    2010.09686).

    Args:
        profile: profile with the cascades and their routes.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        images = profile.metadata.get("images")
        self._calibrated_on = images if isinstance(images, int) and images > 0 else 100
        self.reset()

    def reset(self) -> None:
        """Expect what was calibrated."""
        self.shift, self._known = 0.0, self._calibrated_on
        self.begin()

    def begin(self) -> None:
        """Count images of another cascade, at the same level."""
        self.images = 0  # since another cascade began
        self._counts: dict[int, list[list[int]]] = {}  # for each block and stage, images that went on, and all
        self._recent: deque[int] = deque(maxlen=RECENT)

    def add(self, row: ProfiledCascade, answered_by: Sequence[int]) -> bool:
        """Count images of the running cascade; returns whether a change was noticed, which sets ``shift``.

        Args:
            row: row of the cascade that runs.
            answered_by: number in the cascade, from 0, of the route that answered each image.
        """
        changed = [self._add_one(row, answered) for answered in answered_by if row.shares]
        return any(changed)

    def _add_one(self, row: ProfiledCascade, answered: int) -> bool:
        """Count one image; returns whether the level changed."""
        stages = len(row.route.routes) - 1
        self._recent.append(answered)
        for block in BLOCKS:
            if self.images % block == 0:
                self._counts[block] = [[0, 0] for _ in range(stages)]
            for stage, count in enumerate(self._counts[block][: answered + 1]):
                count[0] += answered > stage
                count[1] += 1
        self.images += 1
        for block in BLOCKS:
            counts = enumerate(self._counts[block])
            if any(self._evidence(row, *each) > _bound(stages, block) for each in counts):
                self._estimate(row, self._counts[block])
                return True
        again = bool(self.shift) and self.images % RECENT == 0
        if again:
            self._estimate(row, self._counts[RECENT])
        return again

    def _evidence(self, row: ProfiledCascade, stage: int, count: Sequence[int], sure: float = SURE) -> float:
        """Logarithm of the evidence that another share of images goes on at a stage than expected."""
        went, seen = count
        if not seen:
            return 0.0
        expected = _rates(row, self.shift)[stage]
        low, high = _interval(expected, max(1.0, self._known * row.shares[stage]), sure)
        share = min(max(went / seen, low), high)
        mixed = math.lgamma(went + 1) + math.lgamma(seen - went + 1) - math.lgamma(seen + 2)
        return mixed - _log_power(share, went) - _log_power(1 - share, seen - went)

    def _estimate(self, row: ProfiledCascade, counts: Sequence[Sequence[int]]) -> None:
        """Set the shift to that at which as many of the counted images, the latest, are expected to go on as did."""
        latest = [*self._recent][-counts[0][1] :]
        went = (sum(latest) + 0.5) * len(latest) / (len(latest) + 1)  # stages gone on from; never none
        low, high = -MOST_SHIFT, MOST_SHIFT
        reached = [sum(answered >= stage for answered in latest) for stage in range(len(row.route.routes))]
        for _ in range(60):
            shift = (low + high) / 2
            expected = sum(count * rate for count, rate in zip(reached, _rates(row, shift), strict=False))
            low, high = (shift, high) if expected < went else (low, shift)
        self.shift, self._known = 0.0, self._calibrated_on
        few = len(latest) < RECENT  # too few to tell that all is as calibrated
        if few or any(self._evidence(row, *each, NEAR) > math.log(DOUBT) for each in enumerate(counts)):
            self.shift, self._known = (low + high) / 2, len(latest)
        self.begin()

    def shares(self, row: ProfiledCascade) -> list[float]:
        """The share of images that is expected to reach each route of a cascade now."""
        shares = [1.0]
        for rate in _rates(row, self.shift):
            shares.append(shares[-1] * rate)
        return shares

    def stage_costs(self, row: ProfiledCascade, cost: str) -> Sequence[float]:
        """What each route of a cascade adds to a cost; of profiles without it the routes' own.

        Args:
            row: row of the cascade.
            cost: cost that an image takes, such as ``macs``.
        """
        return row.stage_costs.get(cost) or [self._profile[route].costs[cost] for route in row.route.routes]

    def mean_cost(self, row: ProfiledCascade, mean: str) -> float:
        """What a cascade is expected to cost now as a mean over images.

        Args:
            row: row of the cascade.
            mean: one of the costs that are means, such as ``mean_macs``.
        """
        if not (self.shift and row.shares):
            return row.costs[mean]
        stages = self.stage_costs(row, MEANS[mean])
        now, then = (sum(map(_product, zip(each, stages, strict=True))) for each in (self.shares(row), row.shares))
        return row.costs[mean] * now / then if then else row.costs[mean]


def _bound(stages: int, block: int) -> float:
    """Logarithm of the evidence that is taken for a change: every count of a block has a share of `ALARM`."""
    return math.log(stages * len(BLOCKS) * BLOCK / block / ALARM)


def _product(pair: tuple[float, float]) -> float:
    return pair[0] * pair[1]


def _rates(row: ProfiledCascade, shift: float) -> list[float]:
    """The share of the images at each stage that goes on, at a shift of their log-odds."""
    rates = []
    for before, after in zip(row.shares, row.shares[1:], strict=False):
        rate = min(max(after / before if before else 0.5, 1e-4), 1 - 1e-4)  # never certain
        rates.append(1 / (1 + math.exp(-math.log(rate / (1 - rate)) - shift)))
    return rates


def _interval(share: float, images: float, sure: float) -> tuple[float, float]:
    """Bounds of a share that was measured on some images, at so many standard deviations (Wilson 1927)."""
    weight = sure**2 / images
    middle = (share + weight / 2) / (1 + weight)
    half = sure * math.sqrt(share * (1 - share) / images + weight / (4 * images)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def _log_power(base: float, exponent: int) -> float:
    """Logarithm of a power, of 0 to the 0 too."""
    return exponent * math.log(max(base, 1e-300)) if exponent else 0.0
