"""Peak memory from pieces is that of the whole route, and what torch's own allocator reports."""

import dataclasses
import itertools

import pytest
import torch
from conftest import CLASSES, MODELS, SIZE, make_anchor
from timm.models.vision_transformer import Block
from torch import nn
from torch.profiler import ProfilerActivity, profile

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.profiling.memory import MB, LiveBytes, MemoryTable, measure_memory, weight_bytes
from restnet_hf.routes.route import one_cut_routes
from restnet_hf.steps import run_steps
from restnet_hf.stitches.tuning import TunedConfig


def test_live_bytes_by_hand():
    x = torch.zeros(100)
    with LiveBytes() as counted:
        y = x + 1
        view, same = y.view(10, 10), x.add_(1)
        assert (counted.live, counted.peak) == (400, 400)
        del y
        assert counted.live == 400, "the view holds it"
        z = torch.ones(50, dtype=torch.float64)
        del view, same
        assert (counted.live, counted.peak) == (400, 800)
        z = z.half()
        assert (counted.live, counted.peak) == (100, 800)
    assert z.nbytes == 100


def test_layers_by_hand():
    """Of two layers the first output lives beside the second, and goes when it is done; the input is not counted."""
    layers = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 4))
    with torch.no_grad(), LiveBytes() as counted:
        y = layers(torch.zeros(3, 8))
        assert counted.peak == 4 * 3 * (8 + 32 + 16) and counted.live == y.nbytes == 4 * 3 * 4


def routes_of(front, end):
    """A model of two networks, with routes of one stitch both ways and one of two."""
    anchors = make_anchor(front), make_anchor(end, seed=1)
    model = StitchedModelForImageClassification.from_anchors(*anchors, order="given")
    names, depths = list(model.anchors), {name: anchor.depth for name, anchor in model.anchors.items()}
    for a, b in itertools.product(names, names):
        routes = list(one_cut_routes(a, depths[a], b, depths[b]))
        for route in routes[:: 1 + len(routes) // 12]:
            model.add_stitch(route)
    model.add_stitch(f"{names[0]}[:1] + {names[1]}[1:2] + {names[0]}[{depths[names[0]]}:]")
    return model


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit"])
def test_pieces_make_the_whole(name):
    model, table, again = routes_of(name, "vit"), MemoryTable(), MemoryTable()
    for route in model.all_routes:
        steps = model.steps(route)
        assert table.memory_mb(steps) == measure_memory(steps)
    for route in reversed(model.all_routes):
        assert again.memory_mb(model.steps(route)) == table.memory_mb(model.steps(route))


def allocated(run):
    """The most bytes that torch's allocator had given out at once, as its profiler reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert sizes
    return max(itertools.accumulate(sizes))


def test_layers_against_the_allocator():
    """Linear layers, norms and attention need no work space."""
    layers = nn.Sequential(nn.Linear(8, 32), Block(32, 2), Block(32, 4), nn.LayerNorm(32), nn.Linear(32, 5)).eval()
    x = torch.randn(3, 20, 8)
    with torch.no_grad(), LiveBytes() as counted:
        layers(x)
    with torch.no_grad():
        assert allocated(lambda: layers(x)) == counted.peak


@pytest.mark.parametrize(("front", "end"), [("registers", "vit"), ("resnet", "swin")])
def test_routes_against_the_allocator(front, end):
    """Convolutions need some work space, which is not counted."""
    model, table, images = routes_of(front, end), MemoryTable(batch_size=3), torch.zeros(3, 3, SIZE, SIZE)
    for route in model.all_routes[::4]:
        steps = model.steps(route)
        with torch.no_grad():
            peak = images.nbytes + allocated(lambda steps=steps: run_steps(images, steps))
        assert table.activation_bytes(steps) <= peak <= 1.4 * table.activation_bytes(steps)


def test_weights_are_those_of_the_baked_route(pair):
    for route in ("resnet[:3] + vit[2:]", "vit[:]", "resnet[:]"):
        baked = pair.bake(route)
        tensors = [*baked.parameters(), *baked.buffers()]
        assert weight_bytes(pair.steps(route)) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_what_is_shared_counts_once(pair):
    steps = pair.steps("vit[:]")
    assert weight_bytes([*steps, *steps]) == weight_bytes(steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision(pair, dtype):
    before = {route: MemoryTable().activation_bytes(pair.steps(route)) for route in pair.all_routes}
    pair.to(dtype)
    for route, was in before.items():
        steps, table = pair.steps(route), MemoryTable()
        assert table.memory_mb(steps) == measure_memory(steps)
        if dtype is torch.float64:  # lower ones are raised inside some operators
            assert table.activation_bytes(steps) == pytest.approx(2 * was, rel=0.001)


def test_batch(pair):
    steps = pair.steps(pair.active_route)
    one, eight = (MemoryTable(batch).activation_bytes(steps) for batch in (1, 8))
    assert eight == pytest.approx(8 * one, rel=0.02)
    assert MemoryTable(8).memory_mb(steps) == measure_memory(steps, 8)
    assert MemoryTable(8).memory_mb(steps) == (weight_bytes(steps) + eight) / MB


def test_what_is_tuned(pair):
    """Low-rank updates are held beside the weights, and whole weights are made of them for each run."""
    steps = pair.steps(pair.active_route)
    before, weights = MemoryTable().activation_bytes(steps), weight_bytes(steps)
    tuned = pair.add_tuned("lora-vit", TunedConfig("lora", "vit", start=2, r=4))
    steps = pair.steps(pair.active_route)
    assert weight_bytes(steps) == weights + sum(p.nbytes for p in tuned.parameters())
    assert MemoryTable().memory_mb(steps) == measure_memory(steps)
    updated = sum(pair.anchors["vit"].model.get_parameter(key.replace("/", ".")).nbytes for key in tuned.A)
    assert MemoryTable().activation_bytes(steps) >= max(before, updated)


class Passing(nn.Module):
    """A view of what it is given."""

    def forward(self, x):
        return x.view_as(x)


def test_steps_that_copy_nothing(pair):
    """What passes through lives on as long as what is made of it."""
    images, front, *rest = (None, *pair.steps(pair.active_route))
    assert images is None
    view = dataclasses.replace(rest[0], name="view", module=Passing(), shape=front.shape)
    steps = [view, front, *rest]
    assert MemoryTable().memory_mb(steps) == measure_memory(steps)
    middle = dataclasses.replace(view, name="in between", shape=rest[0].shape)
    steps = [front, middle, middle, *rest]
    assert MemoryTable().memory_mb(steps) == measure_memory(steps) == MemoryTable().memory_mb([front, *rest])


def test_new_head_and_other_images():
    anchors = [make_anchor("resnet"), make_anchor("vit", seed=1)]
    anchors[1].preprocessing = dataclasses.replace(anchors[1].preprocessing, mean=(0.1, 0.2, 0.3))
    model = StitchedModelForImageClassification.from_anchors(*anchors, num_labels=3, order="given")
    for route in ("resnet[:3] + vit[2:]", "vit[:1] + resnet[2:]", "vit[:]"):
        steps = model.steps(model.add_stitch(route))
        assert MemoryTable().memory_mb(steps) == measure_memory(steps)
    assert CLASSES != 3


def test_an_anchor_alone_needs_no_cuts(pair):
    anchor = make_anchor("vit")
    steps = [dataclasses.replace(pair.steps("vit[:]")[0], module=anchor)]
    assert MemoryTable().memory_mb(steps) == measure_memory(steps)
    assert "not searched" in repr(anchor)
