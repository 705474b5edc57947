"""Costs equal hand formulas, and the sum over blocks equals the count of the whole."""

import pytest
import torch
from conftest import CLASSES, MODELS, SIZE, VIT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from restnet_hf import StitchedModelForImageClassification
from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.profiling.macs import MacsTable, count_macs, count_params
from restnet_hf.routes.route import Route, one_cut_routes


def test_layers_by_hand():
    assert count_macs(nn.Linear(7, 5), torch.zeros(3, 7)) == 3 * 7 * 5
    assert count_macs(nn.Conv2d(6, 8, 3, 2, 1, groups=2), torch.zeros(1, 6, 10, 10)) == 5 * 5 * 8 * 3 * 9


def test_vit_by_hand(anchors):
    """Patches, four projections and an MLP a layer, and both products of attention, which fused kernels hide."""
    n, d, m = (SIZE // 16) ** 2 + 1, VIT["hidden_size"], VIT["intermediate_size"]
    layer = 4 * n * d * d + 2 * n * d * m + 2 * n * n * d
    patches = (n - 1) * 3 * 16 * 16 * d
    assert MacsTable().macs(route_steps(anchors["vit"])) == patches + 3 * layer + d * CLASSES


def route_steps(anchor):
    from restnet_hf.routes.route import Segment
    from restnet_hf.steps import Step

    segment = Segment(anchor.name)
    return [Step(str(segment), anchor, (1, 3, SIZE, SIZE), segment)]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_add_up_to_the_whole(anchors, name):
    anchor = anchors[name]
    assert MacsTable().macs(route_steps(anchor)) == count_macs(anchor.model, torch.zeros(1, 3, SIZE, SIZE))
    assert count_params(route_steps(anchor)) == sum(p.numel() for p in anchor.model.parameters())


@pytest.mark.parametrize(
    ("front", "end"),
    [
        ("resnet", "vit"),
        pytest.param("swin_nhwc", "mobilenet", marks=pytest.mark.slow),
        pytest.param("registers", "swin", marks=pytest.mark.slow),
    ],
)
def test_every_route_of_a_pair(anchors, front, end):
    model = StitchedModelForImageClassification.from_anchors(anchors[front], anchors[end], order="given")
    table = MacsTable()
    for route in one_cut_routes(front, anchors[front].depth, end, anchors[end].depth):
        steps = model.steps(model.add_stitch(route))
        model.set_route(route)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, SIZE, SIZE))
        attention = {"vit", "registers", "swin", "swin_nhwc"} & {front, end}
        whole = count_macs(lambda x: model(x).logits, torch.zeros(1, 3, SIZE, SIZE))
        assert table.macs(steps) == whole
        assert attention or whole == counter.get_total_flops() // 2
        assert count_params(steps) == sum(p.numel() for p in model.bake().parameters())


def test_known_networks_at_full_size():
    """resnet50 is 4.0892 GMACs and deit_small 4.5989 with attention counted (convolutions and matrix products)."""
    import timm

    for name, expected in (("resnet50", 4.0892e9), ("deit_small_patch16_224", 4.5989e9)):
        anchor = Anchor(timm.create_model(name).eval(), name, Preprocessing((224, 224)))
        assert count_macs(anchor.model, torch.zeros(1, 3, 224, 224)) == pytest.approx(expected, rel=1e-4)


def test_shared_parameters_count_once(pair):
    steps = pair.steps("resnet[:3] + vit[2:]")
    assert count_params([*steps, *steps]) == count_params(steps)
    assert count_params(pair.steps(Route.parse("vit[:]"))) == sum(p.numel() for p in pair.anchors["vit"].parameters())
