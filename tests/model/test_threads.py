"""Many threads share a model: each gets the answer to its own image by its own route."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SIZE, make_anchor

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.anchors import runs
from restnet_hf.stitches.tuning import TunedConfig, tuned_keys


THREADS, CALLS = 8, 60
ROUTES = ["resnet[:3] + vit[2:]", "resnet[:1] + vit[1:]", "resnet[:]", "vit[:]"]


@pytest.fixture(scope="module")
def model():
    model = StitchedModelForImageClassification.from_anchors(
        make_anchor("resnet"), make_anchor("vit", seed=1), order="given"
    )
    model.add_stitches(ROUTES)
    model.set_route(ROUTES[0])
    (key,) = (key for key in tuned_keys(model.route(ROUTES[0]))[-1] if key.kind == "norm")
    with torch.no_grad():
        for tensor in model.add_tuned(key, TunedConfig("norm", "vit", start=2)).parameters():
            tensor.add_(0.5)  # so that norms of the first route differ from those of the others
    return model


@pytest.fixture(scope="module")
def each():
    """An image for each thread."""
    return torch.randn(THREADS, 1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def wrong(run, expected, calls=CALLS):
    """The calls, of all threads, that do not give their thread's expected logits."""
    start = threading.Barrier(THREADS)

    def work(thread):
        start.wait()
        with torch.inference_mode():
            return sum(
                not torch.allclose(run(thread, call), expected(thread, call), atol=1e-5) for call in range(calls)
            )

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)))


@pytest.fixture(scope="module")
def logits(model, each):
    """The logits of every image by every route, one after the other."""
    with torch.inference_mode():
        found = [{route: model(image, route=route).logits for route in ROUTES} for image in each]
    assert not torch.allclose(found[0][ROUTES[0]], found[1][ROUTES[0]], atol=1e-2)
    return found


@pytest.mark.parametrize("calls", [CALLS, pytest.param(500, marks=pytest.mark.slow)])
def test_a_route_of_the_call(model, each, logits, calls):
    def route(thread, call):
        return ROUTES[(thread + call) % len(ROUTES)]

    assert not wrong(
        lambda thread, call: model(each[thread], route=route(thread, call)).logits,
        lambda thread, call: logits[thread][route(thread, call)],
        calls,
    )


def test_a_route_of_the_thread(model, each, logits):
    """Whatever route others make active meanwhile."""

    def run(thread, call):
        if call % 10 == 5:
            model.set_route(ROUTES[(thread + call) % len(ROUTES)])
        with model.using(ROUTES[thread % len(ROUTES)]) as route:
            assert str(route) == ROUTES[thread % len(ROUTES)]
            return model(each[thread]).logits

    assert not wrong(run, lambda thread, call: logits[thread][ROUTES[thread % len(ROUTES)]])
    model.set_route(ROUTES[0])


def test_nothing_of_a_run_remains(model, each, logits):
    """Also where runs fail, and copies are made meanwhile; a copy is that of the model at rest."""
    copies = []

    def run(thread, call):
        route = ROUTES[(thread + call) % len(ROUTES)]
        if thread == 0 and call % 20 == 0:
            copies.append(model.bake(ROUTES[0]))
        with pytest.raises(RuntimeError, match="expected input with shape"):
            model.anchors["vit"](torch.zeros(1, 5, 5), start=2)
        return model(each[thread], route=route).logits

    assert not wrong(run, lambda thread, call: logits[thread][ROUTES[(thread + call) % len(ROUTES)]])
    modules = [*model.modules(), *(module for copy in copies for module in copy.modules())]
    assert not any(isinstance(module.__dict__.get("forward"), runs._Forward) for module in modules)
    assert {type(module.__dict__[kind]) for module in modules for kind in ("_parameters", "_buffers")} == {dict}
    assert not any(module._forward_hooks for module in modules)
    with torch.inference_mode():
        assert [torch.equal(copy(each[0]), logits[0][ROUTES[0]]) for copy in copies] == [True] * 3


def test_using_ends(model, each, logits):
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="left"), model.using(ROUTES[2]), model.using(ROUTES[3]):
            assert torch.equal(model(each[0]).logits, logits[0][ROUTES[3]])
            raise RuntimeError("left")
        assert torch.equal(model(each[0]).logits, logits[0][ROUTES[0]]) and str(model.active_route) == ROUTES[0]
    with pytest.raises(ValueError, match="has no stitch yet"), model.using("resnet[:2] + vit[2:]"):
        pass


@pytest.mark.parametrize(
    ("way", "calls"),
    [
        ("baked", CALLS),
        *(pytest.param(way, CALLS, marks=pytest.mark.slow) for way in ("copied", "pickled")),
        *(pytest.param(way, 500, marks=pytest.mark.slow) for way in ("baked", "compiled", "exported")),
    ],
)
def test_one_module_for_all(model, each, logits, way, calls):
    module = model.bake(ROUTES[0])
    if way == "copied":
        module = copy.deepcopy(module)
    elif way == "pickled":
        module = pickle.loads(pickle.dumps(module))
    elif way == "compiled":
        torch._dynamo.reset()  # it counts how often any module was compiled
        module = torch.compile(module, backend="eager", fullgraph=True)
    elif way == "exported":
        module = torch.export.export(module, (each[0],)).module()
    assert not wrong(lambda thread, call: module(each[thread]), lambda thread, call: logits[thread][ROUTES[0]], calls)
