"""CKA equals the formulas, stays exact far from zero, and is never NaN."""

import numpy as np
import pytest
import torch
from formulas import biased_formula, unbiased_formula, unbiased_hsic
from hypothesis import given, settings
from hypothesis import strategies as st

from restnet_hf.selection.cka import AVERAGES, ESTIMATORS, HSIC, KERNELS, gram


def value(x, y, estimator="biased", batch=None, kernel="linear", average="sum"):
    sums = HSIC(estimator, average)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    for a, b in zip(x.split(batch or len(x)), y.split(batch or len(y)), strict=True):
        sums.update(gram(a, kernel)[None], gram(b, kernel)[None])
    return sums.cka()[0, 0]


def test_golden_values():
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    y = rng.randn(100, 10) + x
    assert value(x, y) == pytest.approx(0.55761, abs=5e-6)
    assert value(x, y, "unbiased") == pytest.approx(0.51346, abs=5e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_far_from_zero(offset, dtype):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(48, 5000)) + offset).astype(dtype)
    y = (rng.normal(size=(48, 300)) + x[:, :300] + offset).astype(dtype)
    double = x.astype(np.float64), y.astype(np.float64)
    centred = tuple(v - v.mean(0) for v in double)
    assert value(x, y) == pytest.approx(biased_formula(*double), abs=1e-6)
    assert value(x, y, "unbiased") == pytest.approx(unbiased_formula(*centred), abs=1e-6)


def test_batches_are_summed_before_the_ratio():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 4))
    y = rng.normal(size=(60, 4)) + x
    parts = [(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)]
    sums = [sum(unbiased_hsic(p[a], p[b]) for p in parts) for a, b in ((0, 1), (0, 0), (1, 1))]
    assert value(x, y, "unbiased", batch=20) == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.sampled_from(ESTIMATORS))
def test_invariances(seed, scale, estimator):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=(20, 4))
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    base = value(x, y, estimator)
    assert value(scale * x @ rotation + 3, y, estimator) == pytest.approx(base, abs=1e-9)
    assert value(y, x, estimator) == pytest.approx(base, abs=1e-9)
    assert value(x, x, estimator) == pytest.approx(1, abs=1e-9)
    assert -1 <= base <= 1 and (estimator == "unbiased" or base >= 0)


def test_undefined_is_masked():
    sums = HSIC("unbiased")
    flat, live = torch.zeros(8, 8, dtype=torch.float64), gram(torch.randn(8, 3))
    sums.update(torch.stack([flat, live]), torch.stack([live, flat]))
    found = sums.cka()
    assert found.mask.tolist() == [[True, True], [False, True]]
    assert np.isfinite(found.data).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_short_last_batch_says_nothing(estimator):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(258, 50))
    y = rng.normal(size=(258, 50)) + 0.5 * x
    assert value(x, y, estimator, batch=64) == pytest.approx(value(x[:256], y[:256], estimator, batch=64), abs=1e-12)


def test_too_few_images():
    with pytest.raises(ValueError, match="batches of at least 4"):
        value(torch.randn(3, 2), torch.randn(3, 2), "unbiased")


def rbf(x):
    """A radial kernel as wide as the median distance, by pairs of points in float64."""
    squares = ((x[:, None] - x[None, :]) ** 2).sum(2)
    width = np.sort(squares[~np.eye(len(x), dtype=bool)])
    return np.exp(-squares / (2 * width[(len(width) - 1) // 2]))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_radial_kernel(offset):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(40, 30))
    y = rng.normal(size=(40, 20)) + x[:, :20]
    k, m = rbf(x), rbf(y)
    centre = np.eye(40) - 1 / 40
    k, m = centre @ k @ centre, centre @ m @ centre
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert value(x + offset, y + offset, kernel="rbf") == pytest.approx(expected, abs=1e-6)


def test_mean_of_the_batches_own_ratios():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 4))
    y = rng.normal(size=(60, 4)) + x
    each = [unbiased_formula(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)]
    assert value(x, y, "unbiased", batch=20, average="mean") == pytest.approx(np.mean(each), abs=1e-9)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_shared_out_and_added(average, kernel, estimator):
    """Two that have seen half of the batches each, added, are one that has seen all."""
    rng = np.random.default_rng(4)
    x, y = torch.tensor(rng.normal(size=(64, 9))), torch.tensor(rng.normal(size=(64, 5)))
    halves = [HSIC(estimator, average), HSIC(estimator, average)]
    for index, (a, b) in enumerate(zip(x.split(16), y.split(16), strict=True)):
        halves[index % 2].update(gram(a, kernel)[None], gram(b, kernel)[None])
    halves[0].add(halves[1])
    assert halves[0].cka()[0, 0] == pytest.approx(value(x, y, estimator, 16, kernel, average), abs=1e-12)
    assert halves[0].images == 64
