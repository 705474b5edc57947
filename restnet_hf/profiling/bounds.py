"""drop_bound: the accuracy that one classifier loses against another on the same images, at most."""

import math
from statistics import NormalDist


DOUBT = 0.025  # probability that a bound is too low; twice that for a search, see `choose_way` in the room of exports


def drop_bound(lost: int, won: int, labelled: int, doubt: float = DOUBT) -> float:
    """Upper bound of the accuracy that a classifier loses against another, in percentage points, on one side.

    Both see the same images, so only those on which one of them is right count. The bound is Wald's for a paired
    difference with half an image added to each of the four cells (Agresti and Min 2005, doi 10.1002/sim.1781,
    section 3), which holds its level for few images too.

    Args:
        lost: number of images that only the other classifier, such as the original of an export, classifies correctly.
        won: number of images that only the classifier itself, such as the export, classifies correctly.
        labelled: number of images with a label.
        doubt: probability that the bound is too low.
    """
    difference = (lost - won) / (labelled + 2)
    variance = (lost + won + 1) / (labelled + 2) ** 2 - difference**2 / (labelled + 2)
    return 100 * min(1.0, difference + NormalDist().inv_cdf(1 - doubt) * math.sqrt(variance))
