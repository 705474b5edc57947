"""CKA equals the formulas, stays exact far from zero, and is never NaN."""

import numpy as np
import pytest
import torch
from conftest import make_anchor
from hypothesis import given, settings
from hypothesis import strategies as st

from restnet_hf.routes import Route
from restnet_hf.similarity import ESTIMATORS, FEATURES, HSIC, SELECTORS, Similarity, choose_routes, cka, gram


def value(x, y, estimator="biased", batch=None):
    sums = HSIC(estimator)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    for a, b in zip(x.split(batch or len(x)), y.split(batch or len(y)), strict=True):
        sums.update(gram(a)[None], gram(b)[None])
    return sums.cka()[0, 0]


def biased_formula(x, y):
    """Kornblith et al.: squared Frobenius norms of cross-covariances, in float64."""
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def unbiased_hsic(x, y):
    """Song et al., equation 5, by its three terms."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    total = np.trace(k @ m) + k.sum() * m.sum() / (n - 1) / (n - 2) - 2 * (k @ m).sum() / (n - 2)
    return total / (n * (n - 3))


def unbiased_formula(x, y):
    return unbiased_hsic(x, y) / np.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))


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


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_anchors(anchors, features, estimator):
    """Against the formulas on activations that come from the plain models' own hooks."""
    front, end = anchors["resnet"], anchors["vit"]
    images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batches = [{"resnet": images, "vit": images}]
    found = cka(front, end, batches, estimator=estimator, features=features)
    seen = {}
    for anchor in (front, end):
        for index, cut in enumerate(anchor.cuts, 1):
            anchor.model.get_submodule(cut.name).register_forward_hook(
                lambda m, a, out, key=(anchor.name, index): seen.update(
                    {key: out[0] if isinstance(out, tuple) else out}
                )
            )
    with torch.no_grad():
        front.model(images), end.model(images)
    for anchor in (front, end):
        for cut in anchor.cuts:
            anchor.model.get_submodule(cut.name)._forward_hooks.clear()
    assert found.values.shape == (front.depth, end.depth)
    for (i, j), result in np.ndenumerate(found.values):
        x, y = seen["resnet", i + 1].double(), seen["vit", j + 1].double()
        if features == "pooled":
            x, y = x.mean((2, 3)), y[:, 1:].mean(1)  # the class token is no position
        x, y = (v.flatten(1).numpy() - v.flatten(1).numpy().mean(0) for v in (x, y))
        formula = biased_formula if estimator == "biased" else unbiased_formula
        assert result == pytest.approx(formula(x, y), abs=1e-5)
    assert found.settings["images"] == 16


def test_nan_features_are_named():
    front, end = make_anchor("resnet"), make_anchor("vit")
    bad = torch.full((8, 3, 64, 64), float("nan"))
    with pytest.raises(ValueError, match=r"activations of 'resnet' at cut 1 \(.*\) hold NaN"):
        cka(front, end, [{"resnet": bad, "vit": bad}])


def test_choose_routes():
    values = np.ma.masked_array([[0.9, 0.2, 0.1], [0.5, 0.8, 0.1], [0.1, 0.6, 0.7], [0.9, 0.9, 0.9]])
    values[3] = np.ma.masked
    similarity = Similarity("a", "b", values, {})
    assert choose_routes(similarity, 9) == [Route.parse(f"a[:{i}] + b[{i}:]") for i in (1, 2, 3)]
    assert choose_routes(similarity, 2) == [Route.parse("a[:1] + b[1:]"), Route.parse("a[:3] + b[3:]")]
    with pytest.raises(ValueError, match="max_routes"):
        choose_routes(similarity, 0)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_gives_a_matrix(anchors, images, name):
    found = SELECTORS[name](anchors["swin"], anchors["mobilenet"], [{"swin": images, "mobilenet": images}])
    assert found.values.shape == (anchors["swin"].depth, anchors["mobilenet"].depth)
    assert (found.front, found.end) == ("swin", "mobilenet")


@pytest.mark.parametrize("options", [{"estimator": "exact"}, {"features": "all"}])
def test_unknown_option(anchors, options):
    with pytest.raises(ValueError, match="is not one of"):
        cka(anchors["vit"], anchors["swin"], [], **options)
