"""Cascades parse and print back; confidences are those of torch; temperatures are the best."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from restnet_hf.routes.cascade import Cascade
from restnet_hf.routes.confidences import CONFIDENCES, fit_temperature, measure_confidence
from restnet_hf.routes.route import Route


ROUTES = ("a[:]", "a[:3] + b[2:]", "a[:2] +both b[2:3] + a[4:]", "b[:]", "tuned b[:]")
NUMBERS = st.floats(0, 1)


@given(
    st.lists(st.sampled_from(ROUTES), min_size=2, max_size=4, unique=True),
    st.sampled_from(sorted(CONFIDENCES)),
    st.data(),
)
def test_prints_back(routes, confidence, data):
    count = len(routes) - 1
    thresholds = data.draw(st.sampled_from([(), data.draw(st.tuples(*[NUMBERS] * count))]))
    temperatures = data.draw(st.sampled_from([(), data.draw(st.tuples(*[st.floats(0.05, 20)] * count))]))
    cascade = Cascade(tuple(map(Route.parse, routes)), thresholds, confidence, temperatures if thresholds else ())
    assert Cascade.parse(str(cascade)) == cascade


@pytest.mark.parametrize(
    ("text", "thresholds", "confidence", "temperatures"),
    [
        ("a[:] > b[:]", (), "probability", ()),
        ("a[:]>b[:]", (), "probability", ()),
        ("a[:] >0.8 b[:]", (0.8,), "probability", ()),
        ("a[:] > 1e-3@2.5 b[:]", (0.001,), "probability", (2.5,)),
        ("a[:] >margin 0.25 b[:] >margin .5@3 c[:]", (0.25, 0.5), "margin", (1.0, 3.0)),
        ("night: a[:] >0.5 night: tuned b[:]", (0.5,), "probability", ()),
        ("margin[:] > 1[:]", (), "probability", ()),
        ("a[:] >0.5 night: a[:2] + b[1:]", (0.5,), "probability", ()),
    ],
)
def test_written_forms(text, thresholds, confidence, temperatures):
    cascade = Cascade.parse(text)
    assert (cascade.thresholds, cascade.confidence, cascade.temperatures) == (thresholds, confidence, temperatures)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a[:]", "from 2 to 16 routes, not 1"),
        ("a[:] > a[:]", "holds a route twice"),
        ("a[:2] + b[1:] > night: b[:]", "several adapters"),
        ("a[:] >1.5 b[:]", "must be from 0 to 1"),
        ("a[:] >0.5@0 b[:]", "must be from 0.05 to 20"),
        ("a[:] >0.5 b[:] > c[:]", "all its thresholds are given"),
        ("a[:] >margin 0.5 b[:] >entropy 0.5 c[:]", "of one confidence"),
        ("a[:] >luck 0.5 b[:]", "is not a route"),
        ("a[:] >> b[:]", "is not a route"),
        ("a[:] >" + "0" * 20_000, "characters are no cascade"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        Cascade.parse(text)


@pytest.mark.parametrize("digits", ["1" * 4000, "1" * 2000 + "@" + "1" * 2000, "1." * 2000, "margin " * 1000])
def test_a_long_text_is_refused_soon(digits):
    began = time.perf_counter()
    with pytest.raises(ValueError, match="is not a"):
        Cascade.parse(f"a[:] >{digits}x")
    assert time.perf_counter() - began < 1


def test_a_confidence_of_a_user(monkeypatch):
    monkeypatch.setitem(CONFIDENCES, "lowest", lambda p, previous: 1 - p.min(-1))
    cascade = Cascade.parse("a[:] >lowest 0.5 b[:]")
    assert Cascade.parse(str(cascade)) == cascade


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": (0.5, 0.5)}, "2 routes need 1 thresholds"),
        ({"thresholds": (math.nan,)}, "from 0 to 1"),
        ({"temperatures": (2.0,)}, "belong to thresholds"),
        ({"thresholds": (0.5,), "temperatures": (math.inf,)}, "must be from 0.05 to 20"),
        ({"confidence": "luck"}, r"confidence='luck' is not one of \['agreement'"),
    ],
)
def test_refuses_values(options, message):
    with pytest.raises(ValueError, match=message):
        Cascade((Route.parse("a[:]"), Route.parse("b[:]")), **options)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_confidences_are_those_of_torch(temperature):
    logits = 4 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    p, previous = (logits / temperature).softmax(-1), torch.arange(50) % 7
    highest = p.topk(2).values
    entropy = torch.distributions.Categorical(probs=p).entropy()
    wanted = {
        "probability": highest[:, 0],
        "margin": highest[:, 0] - highest[:, 1],
        "entropy": 1 - entropy / math.log(7),
        "agreement": p.gather(1, previous[:, None])[:, 0],
    }
    for name, expected in wanted.items():
        got = measure_confidence(logits.numpy(), name, temperature, previous.numpy())
        torch.testing.assert_close(torch.from_numpy(got), expected)


def test_first_of_agreement_has_no_other():
    logits = np.eye(3, dtype=np.float32)
    assert np.array_equal(measure_confidence(logits, "agreement"), measure_confidence(logits, "probability"))


@pytest.mark.parametrize("name", sorted(CONFIDENCES))
def test_nan_is_not_sure(name):
    assert not (measure_confidence(np.full((2, 3), np.nan), name, 1.0, np.zeros(2, int)) >= 0).any()


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_temperature_is_the_best(scale):
    """No temperature of a fine grid gives torch's cross-entropy a smaller value."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(400, 5, generator=generator)
    labels = torch.distributions.Categorical(logits=3 * logits).sample()
    best = fit_temperature((scale * logits).numpy(), labels.numpy())
    grid = torch.logspace(-2, 2, 400)
    at_best, *others = (cross_entropy(scale * logits / t, labels).item() for t in (torch.tensor(best), *grid))
    assert at_best <= min(others) + 1e-6
