"""Least squares sets stitches exactly: any batches, large offsets, ill-conditioned features, samples of positions."""

import math

import numpy as np
import pytest
import torch
from conftest import make_anchor

from restnet_hf.anchors.layouts import resize
from restnet_hf.routes.route import StitchPoint
from restnet_hf.stitches import least_squares
from restnet_hf.stitches.branches import BranchStitch
from restnet_hf.stitches.layers import StitchConfig, make_stitch
from restnet_hf.stitches.least_squares import LeastSquares, fit_stitches


def direct(x, y):
    """Solution and R² of the affine regression by numpy's float64 SVD."""
    ones = np.column_stack([x, np.ones(len(x))])
    solution = np.linalg.lstsq(ones, y, rcond=None)[0]
    residual = ((y - ones @ solution) ** 2).sum()
    return solution[:-1].T, solution[-1], 1 - residual / ((y - y.mean(0)) ** 2).sum()


def held_out_r2(x, y, ridge):
    """By hand, of rows (N, P, C) and (N, P, D): R² on the second image of every five, of a fit on the others."""
    held = np.arange(len(x)) % 5 == 1
    (x, test_x), (y, test_y) = (
        [rows.double().numpy()[mask].reshape(-1, rows.shape[2]) for mask in (~held, held)] for rows in (x, y)
    )
    mean_x, mean_y = x.mean(0), y.mean(0)
    gram = (x - mean_x).T @ (x - mean_x)
    gram += ridge * np.diag(gram).mean() * np.eye(len(gram))
    weight = np.linalg.solve(gram, (x - mean_x).T @ (y - mean_y))
    residual = test_y - mean_y - (test_x - mean_x) @ weight
    return 1 - (residual**2).sum() / ((test_y - mean_y) ** 2).sum()


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_least_squares_is_the_direct_solution(offset):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 12)) * np.geomspace(1, 1e-2, 12) + offset
    y = x @ rng.normal(size=(12, 7)) + 0.1 * rng.normal(size=(500, 7)) + 3
    sums = LeastSquares()
    for rows_x, rows_y in zip(np.array_split(x, 9), np.array_split(y, 9), strict=True):
        sums.update(torch.from_numpy(rows_x), torch.from_numpy(rows_y))
    weight, bias, r2 = sums.solve(ridge=0.0)
    expected_weight, expected_bias, expected_r2 = direct(x, y)
    np.testing.assert_allclose(weight, expected_weight, atol=1e-6)
    np.testing.assert_allclose(x @ weight.numpy().T + bias.numpy(), x @ expected_weight.T + expected_bias, atol=1e-7)
    assert r2 == pytest.approx(expected_r2, abs=1e-10)


def test_ill_conditioned_features_from_float32():
    """Condition 1e5: the residual is the best possible to six digits, where a float32 pseudo-inverse is far off."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(4000, 64, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    x = (u * torch.logspace(0, -5, 64, dtype=torch.float64) @ v.T).float() * 60
    y = torch.randn(4000, 16, generator=generator) + 1e3 * x[:, :16]
    sums = LeastSquares()
    for rows_x, rows_y in zip(x.split(333), y.split(333), strict=True):
        sums.update(rows_x, rows_y)
    weight, bias, _ = sums.solve(ridge=1e-14)
    double = x.double().numpy(), y.double().numpy()
    best_weight, best_bias, _ = direct(*double)

    def residual(w, b):
        return ((double[1] - double[0] @ np.asarray(w, np.float64).T - np.asarray(b, np.float64)) ** 2).sum()

    best = residual(best_weight, best_bias)
    assert residual(weight, bias) / best - 1 < 1e-6
    single = torch.linalg.pinv(torch.cat([x, torch.ones(4000, 1)], 1)) @ y
    assert residual(single[:-1].T, single[-1]) / best - 1 > 1e-3


def test_constant_and_dead_channels():
    x = torch.randn(50, 4)
    x[:, 1] = 0
    x[:, 2] = 7
    y = x[:, :1] * 2 + 1
    sums = LeastSquares()
    sums.update(x, y)
    weight, bias, r2 = sums.solve()
    assert torch.allclose(x.double() @ weight.T + bias, y.double(), atol=1e-4)
    assert r2 == pytest.approx(1, abs=1e-6)
    constant = LeastSquares()
    constant.update(torch.ones(9, 3), torch.full((9, 2), 5.0))
    weight, bias, _ = constant.solve()
    assert torch.equal(weight, torch.zeros(2, 3, dtype=torch.float64)) and bias.tolist() == [5, 5]


def test_order_and_size_of_batches_do_not_matter():
    x, y = torch.randn(300, 5) + 50, torch.randn(300, 3) - 20
    results = []
    for size in (7, 64, 300):
        sums = LeastSquares()
        for rows_x, rows_y in zip(x.flip(0).split(size), y.flip(0).split(size), strict=True):
            sums.update(rows_x, rows_y)
        results.append(sums.solve()[0])
    assert torch.allclose(results[0], results[2], atol=1e-9) and torch.allclose(results[1], results[2], atol=1e-9)


@pytest.mark.parametrize("end", ["vit", "registers", "swin_nhwc", "mobilenet"])
@pytest.mark.parametrize("front", ["resnet", "swin", "distilled"])
def test_fit_of_every_pair_is_the_direct_solution(anchors, images, front, end):
    torch.manual_seed(0)
    many = torch.randn(40, 3, 64, 64)
    points = [StitchPoint(front, 1, end, 2), StitchPoint(front, 2, end, 1)]
    stitches = {
        p: make_stitch(anchors[front].layout(p.source_cut), anchors[end].layout(p.target_cut), StitchConfig())
        for p in points
    }
    r2 = fit_stitches(stitches, anchors, ({front: b, end: b} for b in many.split(9)), ridge=1e-3)
    for point, stitch in stitches.items():
        with torch.no_grad():
            x, y = anchors[front](many, stop=point.source_cut), anchors[end](many, stop=point.target_cut)
            spatial, prefix = stitch.source.split(x)
            goal, goal_prefix = stitch.target.split(y)
            x_rows = resize(spatial, stitch.target.grid).flatten(2).transpose(1, 2)
            y_rows = goal.flatten(2).transpose(1, 2)
            shared = min(stitch.source.prefix, stitch.target.prefix)
            if shared:
                x_rows = torch.cat([prefix[:, :shared], x_rows], 1)
                y_rows = torch.cat([goal_prefix[:, :shared], y_rows], 1)
        assert r2[point.name] == pytest.approx(held_out_r2(x_rows, y_rows, 1e-3), abs=1e-4)


def shared(anchors, places, kind="linear"):
    """One stitch for several places, and what the fit is given."""
    points = [StitchPoint(*place, via="both") for place in places]
    front, end = points[0].source, points[0].target
    layouts = anchors[front].layout(points[0].source_cut), anchors[end].layout(points[0].target_cut)
    stitch = make_stitch(*layouts, StitchConfig(kind))
    return stitch, dict.fromkeys(points, stitch)


@pytest.mark.parametrize("kind", ["linear", "lora", "mlp"])
def test_shared_stitch_is_fitted_on_all_its_places(anchors, kind):
    """The solution of numpy.linalg.lstsq on the rows of all places one below the other, whatever the batches."""
    many = torch.randn(48, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    places = [("resnet", 2, "mobilenet", 9), ("resnet", 3, "mobilenet", 9), ("resnet", 3, "mobilenet", 10)]
    stitch, stitches = shared(anchors, places, kind)
    r2 = fit_stitches(stitches, anchors, ({"resnet": b, "mobilenet": b} for b in many.split(17)), ridge=1e-12)
    with torch.no_grad():
        rows = [
            (
                resize(anchors[front](many, 0, i), stitch.target.grid).flatten(2).transpose(1, 2).flatten(0, 1),
                anchors[end](many, 0, j).flatten(2).transpose(1, 2).flatten(0, 1),
            )
            for front, i, end, j in places
        ]
    x, y = (torch.cat(side).double().numpy() for side in zip(*rows, strict=True))
    weight, bias, _ = direct(x, y)
    places_x, places_y = (
        torch.cat([side.unflatten(0, (48, 4)) for side in sides]) for sides in zip(*rows, strict=True)
    )
    images_first = (
        torch.arange(3 * 48).reshape(3, 48).T.flatten()
    )  # the three places of an image are held out together
    held = held_out_r2(*(side[images_first].reshape(48, 12, -1) for side in (places_x, places_y)), 1e-12)
    assert r2 == {"resnet__mobilenet~both": pytest.approx(held, abs=1e-4)}
    assert len(x) == 3 * 48 * 4
    np.testing.assert_allclose(stitch.proj.weight.detach().flatten(1), weight, atol=1e-3 * abs(weight).max())
    np.testing.assert_allclose(stitch.proj.bias.detach(), bias, atol=1e-3 * abs(bias).max())
    with torch.no_grad():
        found = stitch(anchors["resnet"](many, 0, 3)).flatten(2).transpose(1, 2).flatten(0, 1)
    np.testing.assert_allclose(found, rows[1][0].numpy() @ weight.T + bias, atol=1e-3 * abs(y).max())
    alone = direct(rows[0][0].double().numpy(), rows[0][1].double().numpy())[0]
    assert abs(weight - alone).max() > 0.01 * abs(weight).max(), "or one place would do"


def test_tokens_that_a_shared_stitch_lacks_are_fitted_on_all_places(anchors):
    """From a map to a ViT: the class token's own map, too."""
    many = torch.randn(48, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    places = [("resnet", 4, "vit", 1), ("resnet", 5, "vit", 2)]
    stitch, stitches = shared(anchors, places)
    fit_stitches(stitches, anchors, [{"resnet": many, "vit": many}], ridge=1e-12)
    with torch.no_grad():
        x = torch.cat([anchors["resnet"](many, 0, i).mean((2, 3)) for _, i, _, _ in places]).double().numpy()
        y = torch.cat([anchors["vit"](many, 0, j)[:, 0] for *_, j in places]).double().numpy()
    weight, bias, _ = direct(x, y)
    np.testing.assert_allclose(stitch.pool.weight.detach(), weight, atol=1e-3 * abs(weight).max())
    np.testing.assert_allclose(stitch.pool.bias.detach(), bias, atol=1e-3 * abs(bias).max())


def few(anchors, count, ridge="auto"):
    """R² of the stitch from 16 channels to 32, in 4x4 positions of an image, and the stitch."""
    many = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    stitch = make_stitch(anchors["resnet"].layout(3), anchors["vit"].layout(2), StitchConfig())
    batches = ({"resnet": batch, "vit": batch} for batch in many.split(7))
    r2 = fit_stitches({StitchPoint("resnet", 3, "vit", 2): stitch}, anchors, batches, ridge)
    return r2["resnet_3__vit_2"], stitch


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_of_images_claims_no_fit(anchors, count):
    """On the images themselves R² would be 1; of a single image none can be held out."""
    r2, stitch = few(anchors, count)
    assert math.isnan(r2) if count == 1 else r2 < 0.6
    assert all(value.isfinite().all() for value in stitch.state_dict().values())


def test_the_ridge_is_chosen_on_held_out_images(anchors):
    """Never worse than a fixed one by more than the margin, and far better than the weakest for few images."""
    for count in (4, 60):
        fixed = {ridge: few(anchors, count, ridge) for ridge in least_squares.RIDGES}
        best, stitch = few(anchors, count)
        assert best >= max(r2 for r2, _ in fixed.values()) - 2 * least_squares.MARGIN
        same = [r2 for r2, other in fixed.values() if torch.equal(other.proj.weight, stitch.proj.weight)]
        assert best in same and (best > fixed[1e-6][0] + 0.1 or count > 4)


def test_the_ridge_is_checked(anchors):
    for ridge in ("best", -1.0, float("nan")):
        with pytest.raises(ValueError, match="ridge=.* must be a number of at least 0, or 'auto'"):
            few(anchors, 2, ridge)


@pytest.mark.parametrize("count", [1, 12])
def test_too_few_images_are_warned_of(anchors, count, caplog):
    """16 positions of an image for 16 channels, of which there should be twice as many: 2 images."""
    few(anchors, count)
    assert [("at least 2 images" in line) for line in caplog.messages] == ([True] if count == 1 else [])


def test_nothing_to_fit(anchors):
    """Stitches without problems take no part, and are not asked for."""
    branch = BranchStitch(anchors["vit"], 1, 3)
    before = {key: value.clone() for key, value in branch.state_dict().items()}
    assert fit_stitches({StitchPoint("vit", 1, "vit", 3): branch}, anchors, [{"vit": torch.zeros(2, 3, 64, 64)}]) == {}
    assert all(torch.equal(value, before[key]) for key, value in branch.state_dict().items())


def test_bad_calibration(anchors):
    stitch = make_stitch(anchors["resnet"].layout(1), anchors["vit"].layout(1), StitchConfig())
    before = {key: value.clone() for key, value in stitch.state_dict().items()}
    stitches = {StitchPoint("resnet", 1, "vit", 1): stitch}
    with pytest.raises(ValueError, match=r"stitch 'resnet_1__vit_1' cannot be fitted: .* empty"):
        fit_stitches(stitches, anchors, [])
    bad = torch.full((2, 3, 64, 64), float("nan"))
    with pytest.raises(ValueError, match=r"stitch 'resnet_1__vit_1' cannot be fitted: features hold NaN"):
        fit_stitches(stitches, anchors, [{"resnet": bad, "vit": bad}])
    assert all(torch.equal(value, before[key]) for key, value in stitch.state_dict().items())


def test_large_maps_are_fitted_on_a_sample(monkeypatch):
    """Beyond that many positions of an image the fit takes a sample, and comes to nearly the same stitch."""
    torch.manual_seed(0)
    front, end = make_anchor("resnet"), make_anchor("mobilenet", seed=1)
    images = [{"resnet": batch, "mobilenet": batch} for batch in torch.randn(4, 16, 3, 64, 64)]
    point = StitchPoint("resnet", 2, "mobilenet", 1)
    every = torch.cat([batch["resnet"] for batch in images])
    errors, r2 = [], []
    for positions in (10_000, 64, 16):
        monkeypatch.setattr(least_squares, "MAX_POSITIONS", positions)
        stitch = make_stitch(front.layout(2), end.layout(1), StitchConfig())
        r2 += fit_stitches({point: stitch}, {"resnet": front, "mobilenet": end}, images).values()
        with torch.no_grad():
            errors.append((stitch(front(every, stop=2)) - end(every, stop=1)).square().mean().item())
    assert end.layout(1).grid == (16, 16)
    assert errors[0] < errors[1] < 1.05 * errors[0] and errors[2] < 1.2 * errors[0]
    assert r2[1:] == pytest.approx([r2[0]] * 2, abs=0.1)
