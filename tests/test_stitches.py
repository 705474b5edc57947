"""Stitches carry any layout to any other, and least squares sets them exactly."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, MODELS, SIZE, make_anchor, make_model

from restnet_hf import Anchor, Preprocessing, StitchedModelForImageClassification, stitches
from restnet_hf.features import JointLayout, Layout, resize, resize_matrix
from restnet_hf.routes import StitchPoint
from restnet_hf.stitches import (
    CLASS_TOKENS,
    STITCHES,
    LeastSquares,
    StitchConfig,
    fit_stitches,
    make_stitch,
)


SOURCES = [Layout("NCHW", 6, (4, 4)), Layout("NHWC", 6, (6, 6)), *(Layout("NLC", 6, (4, 4), n) for n in (0, 1, 2, 5))]
SOURCES += [JointLayout((Layout("NLC", 2, (2, 2), 1), Layout("NCHW", 4, (4, 4))))]
TARGETS = [
    Layout("NCHW", 5, (4, 4)),
    Layout("NCHW", 5, (7, 7)),
    Layout("NHWC", 5, (3, 3)),
    Layout("NLC", 5, (4, 4), 1),
    Layout("NLC", 5, (4, 4)),
    Layout("NLC", 5, (4, 4), 2),
    Layout("NLC", 5, (2, 2), 5),
    JointLayout((Layout("NLC", 3, (4, 4), 1), Layout("NHWC", 2, (2, 2)))),
]


def every_kind():
    return [StitchConfig(kind, token) for kind in STITCHES for token in CLASS_TOKENS]


@pytest.mark.parametrize("config", every_kind(), ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_contract(source, target, config):
    """Shape, gradients everywhere, and a least-squares fit that beats a random stitch and reports the error it has."""
    torch.manual_seed(0)
    stitch = make_stitch(source, target, config)
    x = torch.randn(source.shape(40))
    y = torch.tanh(make_stitch(source, target, StitchConfig(config.kind, "pool"))(x)).detach()
    out = stitch(x)
    assert out.shape == target.shape(40)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stitch.parameters())
    random = (out - y).square().mean().item()
    for problem in stitch.problems():
        sums = LeastSquares()
        sums.update(problem.inputs(x, None).flatten(0, 1), problem.outputs(y, None).flatten(0, 1))
        weight, bias, _ = sums.solve()
        problem.assign(weight, bias)
    assert (stitch(x) - y).square().mean().item() < 0.7 * random


def direct(x, y):
    """Solution and R² of the affine regression by numpy's float64 SVD."""
    ones = np.column_stack([x, np.ones(len(x))])
    solution = np.linalg.lstsq(ones, y, rcond=None)[0]
    residual = ((y - ones @ solution) ** 2).sum()
    return solution[:-1].T, solution[-1], 1 - residual / ((y - y.mean(0)) ** 2).sum()


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


def test_learned_class_token_is_the_mean():
    source, target = Layout("NCHW", 3, (4, 4)), Layout("NLC", 4, (4, 4), 1)
    stitch = make_stitch(source, target, StitchConfig(class_token="learn"))
    y = torch.randn(target.shape(30))
    problem = stitch.problems()[1]
    sums = LeastSquares()
    x = torch.randn(source.shape(30))
    sums.update(problem.inputs(x, None).flatten(0, 1), problem.outputs(y, None).flatten(0, 1))
    problem.assign(*sums.solve()[:2])
    assert torch.allclose(stitch(x)[:, 0], y[:, 0].mean(0).expand(30, 4), atol=1e-6)


@pytest.mark.parametrize("spare", [1, 5])
def test_spare_tokens_are_added_or_dropped(spare):
    """A target that is a map of the grid plus another of the prefix tokens: adding finds both, dropping cannot."""
    torch.manual_seed(0)
    source, target = Layout("NLC", 3, (4, 4), spare), Layout("NCHW", 2, (4, 4))
    x = torch.randn(source.shape(60))
    spatial, prefix = source.split(x)
    of_grid, of_prefix, bias = torch.randn(2, 3), torch.randn(2, 3 * spare), torch.randn(2)
    y = torch.einsum("dc,nchw->ndhw", of_grid, spatial) + (prefix.flatten(1) @ of_prefix.T + bias)[:, :, None, None]
    errors = {}
    for token in ("add", "drop"):
        stitch = make_stitch(source, target, StitchConfig(class_token=token))
        (problem,) = stitch.problems()
        sums = LeastSquares()
        sums.update(problem.inputs(x, None).flatten(0, 1), problem.outputs(y, None).flatten(0, 1))
        problem.assign(*sums.solve()[:2])
        errors[token] = (stitch(x) - y).abs().max().item()
    assert errors["add"] < 1e-4 and errors["drop"] > 0.1
    stitch = make_stitch(source, target, StitchConfig(class_token="add"))
    assert stitch.added.weight.shape == (2, 3 * spare)


def test_each_value_decides_for_its_own_direction():
    """Towards a class token "add" and "drop" mean "pool"; away from one "learn" and "pool" mean "drop"."""
    cnn, vit = Layout("NCHW", 3, (4, 4)), Layout("NLC", 4, (4, 4), 1)

    def weights(source, target, token):
        stitch = make_stitch(source, target, StitchConfig(class_token=token))
        return sorted(name for name, _ in stitch.named_parameters())

    assert weights(cnn, vit, "add") == weights(cnn, vit, "drop") == weights(cnn, vit, "pool")
    assert weights(vit, cnn, "learn") == weights(vit, cnn, "pool") == weights(vit, cnn, "drop")
    assert weights(vit, cnn, "add") == ["added.weight", "proj.bias", "proj.weight"]
    assert weights(cnn, vit, "learn") == ["prefix", "proj.bias", "proj.weight"]


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
    r2 = fit_stitches(stitches, anchors, ({front: b, end: b} for b in many.split(9)))
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
            _, _, expected = direct(x_rows.flatten(0, 1).double().numpy(), y_rows.flatten(0, 1).double().numpy())
        assert r2[point.name] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("end", MODELS)
@pytest.mark.parametrize("front", MODELS)
def test_every_pair_trains(anchors, images, front, end):
    """Any layout to any other, on real networks: logits, gradients, and a fit that beats random weights."""
    torch.manual_seed(0)
    point = StitchPoint(front, 2, end, 1 if end == front else 2)
    stitch = make_stitch(anchors[front].layout(2), anchors[end].layout(point.target_cut), StitchConfig())
    with torch.no_grad():
        source, goal = anchors[front](images, stop=2), anchors[end](images, stop=point.target_cut)
        random = (stitch(source) - goal).square().mean()
    logits = anchors[end](stitch(source), start=point.target_cut)
    assert logits.shape == (len(images), CLASSES)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stitch.parameters())
    fit_stitches({point: stitch}, anchors, [{front: images, end: images}])
    with torch.no_grad():
        assert (stitch(source) - goal).square().mean() < 0.9 * random


@pytest.mark.parametrize("token", CLASS_TOKENS)
@pytest.mark.parametrize("end", ["resnet", "vit", "swin", "plain"])
@pytest.mark.parametrize("front", ["mobilenet", "registers", "plain"])
def test_anchors_of_different_image_sizes(front, end, token):
    """A CNN at 96 pixels beside networks at 64: grids that do not divide each other."""
    torch.manual_seed(0)
    side = 96 if front in ("mobilenet", "plain") else SIZE
    anchors = [Anchor(make_model(front), "front", Preprocessing((side, side))), make_anchor(end, 1)]
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    route = model.set_route(model.add_stitch(f"front[:2] + {anchors[1].name}[2:]", StitchConfig(class_token=token)))
    images, (stitch,) = torch.randn(6, 3, side, side), model.stitches.values()
    assert stitch.source.grid != stitch.target.grid or front == "registers"
    model(images, labels=torch.arange(6) % CLASSES).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stitch.parameters())
    (point,) = route.stitch_points
    with torch.no_grad():
        source, goal = anchors[0](images, stop=2), anchors[1](model.images_for(anchors[1].name, images), stop=2)
        random = (stitch(source) - goal).square().mean()
        model.fit_stitches(images)
        assert (stitch(source) - goal).square().mean() < 0.9 * random
    assert point.name in model.config.stitches


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


@pytest.mark.parametrize("options", [{"kind": "cubic"}, {"class_token": "guess"}])
def test_config_refused(options):
    with pytest.raises(ValueError, match="is not one of"):
        StitchConfig(**options)


@pytest.mark.parametrize("config", every_kind(), ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_a_sample_of_positions(source, target, config):
    """Sampled rows are the full rows at the places drawn, those of inputs and outputs at the same ones."""
    torch.manual_seed(1)
    stitch = make_stitch(source, target, config)
    x, y = torch.randn(source.shape(6)), torch.randn(target.shape(6))
    for problem in stitch.problems():
        chosen = problem.chosen(6, 3, seed=4)
        for activation, rows in ((x, problem.inputs), (y, problem.outputs)):
            every = rows(activation, None)
            assert every.shape[:2] == (6, problem.positions)
            if chosen is None:
                assert problem.positions <= 3
                continue
            assert chosen.shape == (6, 3) and all(len(set(row)) == 3 for row in chosen.tolist())
            some = rows(activation, chosen)
            expected = torch.stack([image[places] for image, places in zip(every, chosen, strict=True)])
            assert torch.allclose(some, expected, atol=1e-6)


@pytest.mark.parametrize("source", [(4, 4), (3, 5), (7, 7)])
@pytest.mark.parametrize("target", [(4, 4), (2, 2), (9, 8), (5, 3)])
def test_resizing_as_a_matrix(source, target):
    x = torch.randn(2, 3, *source)
    by_matrix = x.flatten(2) @ resize_matrix(source, target).T
    assert torch.allclose(by_matrix, resize(x, target).flatten(2), atol=1e-6)


def test_large_maps_are_fitted_on_a_sample(monkeypatch):
    """Beyond that many positions of an image the fit takes a sample, and comes to nearly the same stitch."""
    torch.manual_seed(0)
    front, end = make_anchor("resnet"), make_anchor("mobilenet", seed=1)
    images = [{"resnet": batch, "mobilenet": batch} for batch in torch.randn(4, 16, 3, 64, 64)]
    point = StitchPoint("resnet", 2, "mobilenet", 1)
    every = torch.cat([batch["resnet"] for batch in images])
    errors, r2 = [], []
    for positions in (10_000, 64, 16):
        monkeypatch.setattr(stitches, "POSITIONS", positions)
        stitch = make_stitch(front.layout(2), end.layout(1), StitchConfig())
        r2 += fit_stitches({point: stitch}, {"resnet": front, "mobilenet": end}, images).values()
        with torch.no_grad():
            errors.append((stitch(front(every, stop=2)) - end(every, stop=1)).square().mean().item())
    assert end.layout(1).grid == (16, 16)
    assert errors[0] < errors[1] < 1.05 * errors[0] and errors[2] < 1.2 * errors[0]
    assert r2[1:] == pytest.approx([r2[0]] * 2, abs=0.1)
