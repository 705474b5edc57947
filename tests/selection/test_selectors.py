"""Selectors agree with the formulas, computed on activations that come from the plain models' own hooks."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, make_anchor
from formulas import biased_formula, unbiased_formula
from torch import nn
from waiting import Waits

from restnet_hf.selection.cka import ESTIMATORS, gram
from restnet_hf.selection.samples import Pair, Samples, SampleStore, SelectionBatch
from restnet_hf.selection.selectors import FEATURES, SELECTORS, TOKENS, ProbeKL, compare


COUNT = 24
IMAGES = torch.randn(COUNT, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(COUNT) % CLASSES


def seen(anchors, images=IMAGES, labels=None, batch=COUNT):
    finish = dict.fromkeys((anchor.name for anchor in anchors), nn.Identity())
    by_name = {anchor.name: anchor for anchor in anchors}
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        inputs = dict.fromkeys(by_name, images[part])
        yield SelectionBatch(start, inputs, by_name, finish, None if labels is None else labels[part])


def one(front, end, method, images=IMAGES, labels=None, batch=COUNT, **options):
    pair = Pair(front, end, nn.Identity())
    return compare([pair], lambda: seen((front, end), images, labels, batch), {method: options})[method][0]


def ready(front, end, method, images=IMAGES, batch=COUNT):
    """A selector that has read all batches."""
    samples = Samples(Pair(front, end, nn.Identity()))
    selector = SELECTORS[method](samples.pair, samples)
    for each in seen((front, end), images, batch=batch):
        each.run(lambda *args, seen=each: samples.read(*args, seen))
        samples.update(each)
    return selector


def hooked(anchor):
    """Activations at every cut by hooks on the plain model."""
    found, handles = {}, []
    for index, cut in enumerate(anchor.cuts, 1):
        handles.append(
            anchor.model.get_submodule(cut.name).register_forward_hook(
                lambda m, a, out, index=index: found.update({index: out[0] if isinstance(out, tuple) else out})
            )
        )
    with torch.no_grad():
        anchor.model(IMAGES)
    for handle in handles:
        handle.remove()
    return {index: value.double() for index, value in found.items()}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_cka(anchors, features, estimator):
    front, end = anchors["resnet"], anchors["vit"]
    found = one(front, end, "cka", estimator=estimator, features=features)
    maps, tokens = hooked(front), hooked(end)
    assert found.values.shape == (front.depth, end.depth) and found.settings["images"] == COUNT
    for (i, j), result in np.ndenumerate(found.values):
        x, y = maps[i + 1], tokens[j + 1]
        if features == "pooled":
            x, y = x.mean((2, 3)), y[:, 1:].mean(1)  # the class token is no position
        elif features == "tokens":
            y = y[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
            x, y = (nn.functional.adaptive_avg_pool2d(v, TOKENS).permute(0, 2, 3, 1).flatten(0, 2) for v in (x, y))
        x, y = (v.flatten(1).numpy() - v.flatten(1).numpy().mean(0) for v in (x, y))
        formula = biased_formula if estimator == "biased" else unbiased_formula
        assert result == pytest.approx(formula(x, y), abs=1e-5)


def test_position(anchors):
    values = one(anchors["resnet"], anchors["vit"], "position").values
    depths = anchors["resnet"].depth, anchors["vit"].depth
    assert values.shape == depths
    assert values[0, 0] == pytest.approx(1 - abs(1 / (depths[0] + 1) - 1 / (depths[1] + 1)))
    assert values.max() <= 1 and values[-1, 0] == pytest.approx(values.min())


def test_held_out_r2(anchors):
    """By numpy, in float64, on the rows that were kept: fitted on every other image, explained on the others."""
    front, end = anchors["resnet"], anchors["mobilenet"]
    samples = Samples(Pair(front, end, nn.Identity()))
    samples.keep_rows()
    for batch in seen((front, end), batch=8):
        batch.run(lambda *args, seen=batch: samples.read(*args, seen))
        samples.update(batch)
    values = one(front, end, "lstsq", batch=8).values
    for i, j in ((1, 1), (3, 5), (front.depth, end.depth)):
        (problem,) = samples.problems[i, j]
        x = samples.rows("in", i, problem.key_in).double().numpy()
        y = samples.rows("out", j, problem.key_out).double().numpy()
        assert x.shape[:2] == y.shape[:2] == (COUNT, min(4, np.prod(end.layout(j).grid)))
        (fit_x, fit_y), (test_x, test_y) = ([v[k::2].reshape(-1, v.shape[2]) for v in (x, y)] for k in (0, 1))
        mean_x, mean_y = fit_x.mean(0), fit_y.mean(0)
        a, b = fit_x - mean_x, fit_y - mean_y
        weight = np.linalg.solve(a.T @ a + 0.01 * np.trace(a.T @ a) / a.shape[1] * np.eye(a.shape[1]), a.T @ b)
        left = test_y - mean_y - (test_x - mean_x) @ weight
        expected = 1 - (left**2).sum() / ((test_y - mean_y) ** 2).sum()
        assert values[i - 1, j - 1] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("names", [("resnet", "vit"), ("vit", "mobilenet"), ("tnt", "resnet"), ("resnet", "tnt")])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_fitted_accuracy(anchors, names, labels):
    """What a route through the kept stitch scores, run step by step on the held-out images."""
    front, end = (anchors[name] for name in names)
    found = one(front, end, "fitted_accuracy", labels=labels)
    values = found.values
    samples = Samples(Pair(front, end, nn.Identity()))
    samples.keep_rows()
    for batch in seen((front, end), labels=labels):
        batch.run(lambda *args, seen=batch: samples.read(*args, seen))
        samples.update(batch)
    stitches = samples.stitches(0.01)
    larger = max((front, end), key=lambda anchor: anchor.num_parameters())
    with torch.no_grad():
        guess = larger.model(IMAGES)
        truth = getattr(guess, "logits", guess).argmax(-1)[1::2] if labels is None else labels[1::2]
        for i, j in ((1, 1), (front.depth, end.depth)):
            logits = end(stitches[i, j](front(IMAGES[1::2], stop=i)), start=j)
            assert values[i - 1, j - 1] == pytest.approx((logits.argmax(-1) == truth).double().mean().item())
        for anchor in (front, end):
            alone = (anchor(IMAGES[1::2]).argmax(-1) == truth).double().mean().item()
            assert found.settings["anchors"][anchor.name] == pytest.approx(alone)


@pytest.mark.slow
def test_probes(anchors):
    """The probes are at the minimum of the regularised loss, and the value is KLAS's ratio of their divergences."""
    front, end = anchors["resnet"], anchors["vit"]
    samples = Samples(Pair(front, end, nn.Identity()))
    selector = ProbeKL(samples.pair, samples, weight_decay=0.02)
    for batch in seen((front, end), labels=LABELS):
        batch.run(lambda *args, seen=batch: samples.read(*args, seen))
        samples.update(batch)
    values = selector.values()
    maps, tokens = hooked(front), hooked(end)
    pooled = {("f", i): v.mean((2, 3)) for i, v in maps.items()} | {
        ("g", j): v[:, 1:].mean(1) for j, v in tokens.items()
    }
    outputs = {key: reference_probe(x, 0.02) for key, x in pooled.items()}
    with torch.no_grad():
        last = end.model(IMAGES).logits.double()[1::2].log_softmax(-1)

    def theta(a, b):
        return (a.exp() * (a - b)).sum(-1).mean().item()

    for i, j in ((1, 1), (2, end.depth), (front.depth, 2)):
        after = outputs["g", j + 1] if j < end.depth else last
        ratio = theta(outputs["f", i], outputs["g", j]) / theta(outputs["g", j], after)
        assert values[i - 1, j - 1] == pytest.approx(1 / (1 + ratio), rel=2e-2)


def reference_probe(x, weight_decay):
    """Softmax regression by plain gradient descent in float64, far longer than is needed."""
    fit, test = x[0::2], x[1::2]
    mean, std = fit.mean(0), fit.std(0).clamp_min(1e-6)
    fit, test = (fit - mean) / std, (test - mean) / std
    weight, bias = fit.new_zeros(x.shape[1], CLASSES), fit.new_zeros(CLASSES)
    targets = nn.functional.one_hot(LABELS[0::2], CLASSES).double()
    rate = 1 / (torch.linalg.matrix_norm(fit, 2) ** 2 / len(fit) + 2 * weight_decay + 1)
    for _ in range(20_000):
        wrong = ((fit @ weight + bias).softmax(-1) - targets) / len(fit)
        weight -= rate * (fit.T @ wrong + 2 * weight_decay * weight)
        bias -= rate * wrong.sum(0)
    return (test @ weight + bias).log_softmax(-1)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_both_ways(anchors, name):
    """One matrix for each direction, from one forward of each anchor for each batch."""
    front, end = anchors["swin"], anchors["mobilenet"]
    calls = []
    front.search(), end.search()
    handles = [anchor.model.register_forward_pre_hook(lambda m, a: calls.append(m)) for anchor in (front, end)]
    pairs = [Pair(front, end, nn.Identity()), Pair(end, front, nn.Identity())]
    found = compare(pairs, lambda: seen((front, end), batch=8), {name: {}})[name]
    for handle in handles:
        handle.remove()
    assert [(f.front, f.end) for f in found] == [("swin", "mobilenet"), ("mobilenet", "swin")]
    assert [f.values.shape for f in found] == [(front.depth, end.depth), (end.depth, front.depth)]
    assert all(np.isfinite(f.values.compressed()).all() and f.settings["method"] == name for f in found)
    assert len(calls) <= {"position": 0, "cka": 6, "lstsq": 12, "kl_probe": 12}.get(name, 1000)
    again = compare(pairs, lambda: seen((front, end), batch=8), {name: {}})[name]
    assert all(np.array_equal(a.values, b.values) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "position"])
def test_nan_features_are_named(name):
    front, end = make_anchor("resnet"), make_anchor("vit")
    with pytest.raises(ValueError, match=r"activations of 'resnet' at cut 1 \(.*\) hold NaN"):
        one(front, end, name, torch.full((8, 3, 64, 64), float("nan")))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cka", {"estimator": "exact"}, "estimator='exact' is not one of"),
        ("cka", {"features": "all"}, "features='all' is not one of"),
        ("cka", {"kernel": "cubic"}, "kernel='cubic' is not one of"),
        ("cka", {"average": "median"}, "average='median' is not one of"),
        ("lstsq", {"rigde": 1}, "'lstsq'.*rigde"),
        ("magic", {}, "method='magic' is not one of"),
    ],
)
def test_unknown_option(anchors, name, options, message):
    with pytest.raises(ValueError, match=message):
        one(anchors["vit"], anchors["swin"], name, **options)


@pytest.mark.parametrize("name", ["cka", "lstsq", "kl_probe", "fitted_accuracy"])
def test_too_few_images(anchors, name):
    with pytest.raises(ValueError, match="images"):
        one(anchors["vit"], anchors["swin"], name, IMAGES[:1])


def test_what_is_kept_does_not_grow(anchors):
    front, end = anchors["resnet"], anchors["vit"]
    sizes = []
    for count in (16, 24):
        samples = Samples(Pair(front, end, nn.Identity()), images=10)
        samples.keep_rows()
        samples.keep_pooled()
        samples.keep_images()
        for batch in seen((front, end), IMAGES[:count], LABELS[:count], batch=8):
            batch.run(lambda *args, seen=batch, into=samples: into.read(*args, seen))
            samples.update(batch)
        sizes.append(sum(t.nbytes for chunk in samples.chunks for t in chunk.values()))
        assert samples.settings() == {"images": 10, "held_out": 5}
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_for_probes(pair, count):
    images = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="images? (are needed|came, and probes need 3)"):
        pair.select_stitches(images, method="kl_probe", max_routes=1)


def calls_of(anchors):
    """Calls of each anchor's network from here on, by name, and a function that stops counting."""
    calls = dict.fromkeys((anchor.name for anchor in anchors), 0)

    def count(name):
        calls[name] += 1

    handles = [a.model.register_forward_pre_hook(lambda m, x, name=a.name: count(name)) for a in anchors]
    return calls, lambda: [handle.remove() for handle in handles]


def test_several_pairs_share_one_pass(anchors):
    """Three anchors in both directions: each runs once a batch, what is kept is there once, and values are those of
    the pair alone."""
    chosen = [anchors[name] for name in ("resnet", "vit", "swin")]
    pairs = [Pair(a, b, nn.Identity()) for a in chosen for b in chosen if a is not b]
    methods = {name: {} for name in ("cka", "lstsq", "kl_probe", "fitted_accuracy", "position")}
    alone = {pair.names: {name: one(pair.front, pair.end, name, labels=LABELS, batch=8) for name in methods}
             for pair in pairs}  # fmt: skip
    cheap = {name: {} for name in ("cka", "lstsq", "kl_probe")}
    calls, stop = calls_of(chosen)
    compare(pairs, lambda: seen(chosen, labels=LABELS, batch=8), cheap)
    stop()
    assert set(calls.values()) == {6}, "three batches, to the last cut and on to the logits"
    together = compare(pairs, lambda: seen(chosen, labels=LABELS, batch=8), methods)
    for name, similarities in together.items():
        assert [(s.front, s.end) for s in similarities] == [pair.names for pair in pairs]
        for similarity in similarities:
            expected = alone[similarity.front, similarity.end][name]
            assert np.allclose(similarity.values, expected.values, atol=1e-6), name
            assert dict(similarity.settings) == dict(expected.settings)


def test_samples_of_several_pairs_are_kept_once(anchors):
    chosen = [anchors[name] for name in ("resnet", "vit", "swin")]
    store = SampleStore(8)
    views = [Samples(Pair(a, b, nn.Identity()), store=store) for a in chosen for b in chosen if a is not b]
    for view in views:
        view.keep_rows()
        view.keep_pooled()
        view.keep_images()
    for batch in seen(chosen, batch=8):
        batch.run(lambda *args, seen=batch: store.read(*args, seen))
        store.update(batch)
    (chunk,) = store.chunks
    assert sum(key[0] == "pooled" for key in chunk) == sum(anchor.depth for anchor in chosen)
    assert len({chunk["images", anchor.name].data_ptr() for anchor in chosen}) == 1
    outputs = {key[1:3] for key in chunk if key[0] == "out"}
    assert len(outputs) == sum(anchor.depth for anchor in chosen)
    assert sum(key[0] == "out" and key[1] == "resnet" for key in chunk) == chosen[0].depth


@pytest.mark.parametrize(("method", "runs"), [("lstsq", 4), ("kl_probe", 4), ("cka", 3)])
def test_no_more_images_run_than_are_used(anchors, method, runs):
    front, end = anchors["resnet"], anchors["vit"]
    calls, stop = calls_of((front, end))
    compare([Pair(front, end, nn.Identity())], lambda: seen((front, end), batch=8), {method: {}}, kept_images=16)
    stop()
    assert calls == {"resnet": runs, "vit": runs}


def test_fitted_accuracy_waits_for_no_pair_of_cuts():
    """Three times the batches that routes are tested on, and a device would be waited for as often."""
    front, end, counts = make_anchor("resnet"), make_anchor("vit"), []
    for images in (128, 384):  # half of which are tests, 64 at a time
        noise = torch.randn(images, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        selector = ready(front, end, "fitted_accuracy", noise, 64)
        with torch.no_grad(), Waits() as waits:
            selector.values()
        counts.append(waits.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["lstsq", "kl_probe"])
def test_fits_are_exact_under_autocast(anchors, name):
    """Networks compute in half precision there, what is fitted to them does not."""
    values = {}
    for half in (False, True):
        selector = ready(anchors["resnet"], anchors["vit"], name)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            values[half] = selector.values()
    assert np.abs(values[True] - values[False]).max() < 1e-6


def test_similarity_of_long_features_under_autocast():
    """Blocks of more than 4,096 columns are multiplied in float32, also there."""
    feature = torch.randn(8, 6000, generator=torch.Generator().manual_seed(0)) + 5
    with torch.autocast("cpu", torch.bfloat16):
        found = gram(feature)
    centred = feature.double() - feature.double().mean(0)
    assert (found - centred @ centred.T).abs().max() < 1e-2 < 1e-5 * found.abs().max()
