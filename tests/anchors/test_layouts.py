"""Layouts are read off shapes, and conversion loses nothing."""

import json
from dataclasses import asdict

import pytest
import torch

from restnet_hf.anchors.layouts import JointLayout, Layout, infer_layout, layout_from_dict, resize


LAYOUTS = [Layout("NCHW", 6, (4, 5)), Layout("NHWC", 6, (4, 5)), *(Layout("NLC", 6, (4, 5), p) for p in (0, 1, 2, 5))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_split_and_join_are_inverse(layout):
    x = torch.randn(layout.shape(3))
    spatial, prefix = layout.split(x)
    assert spatial.shape == (3, 6, 4, 5)
    assert (prefix is None) == (layout.prefix == 0)
    assert torch.equal(layout.join(spatial, prefix), x)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_position_is_row_by_row(layout):
    """Value h * 10 + w at position (h, w) whatever the layout."""
    expected = torch.arange(4)[:, None] * 10.0 + torch.arange(5)
    x = layout.join(expected.expand(1, 6, 4, 5), torch.zeros(1, layout.prefix, 6) if layout.prefix else None)
    assert x.shape == layout.shape(1)
    assert torch.equal(layout.split(x)[0][0, 0], expected)


@pytest.mark.parametrize(
    ("shape", "size", "layout"),
    [
        ((2, 64, 56, 56), (224, 224), Layout("NCHW", 64, (56, 56))),
        ((2, 56, 56, 96), (224, 224), Layout("NHWC", 96, (56, 56))),
        ((2, 7, 7, 7), (224, 224), Layout("NCHW", 7, (7, 7))),
        ((2, 24, 7, 14), (224, 448), Layout("NCHW", 24, (7, 14))),
        ((2, 7, 14, 24), (224, 448), Layout("NHWC", 24, (7, 14))),
        ((2, 196, 384), (224, 224), Layout("NLC", 384, (14, 14))),
        ((2, 197, 384), (224, 224), Layout("NLC", 384, (14, 14), 1)),
        ((2, 198, 192), (224, 224), Layout("NLC", 192, (14, 14), 2)),
        ((2, 201, 384), (224, 224), Layout("NLC", 384, (14, 14), 5)),
        ((2, 99, 384), (224, 448), Layout("NLC", 384, (7, 14), 1)),
        ((2, 2048), (224, 224), None),
        ((2, 2048, 1, 1), (224, 224), None),
        ((2, 3, 4, 5, 6), (224, 224), None),
    ],
)
def test_infer(shape, size, layout):
    assert infer_layout(shape, size) == layout


def test_known_grids_decide_the_prefix():
    assert infer_layout((2, 9, 8), (32, 32)) == Layout("NLC", 8, (3, 3))
    assert infer_layout((2, 9, 8), (32, 32), grids={(2, 2)}) == Layout("NLC", 8, (2, 2), 5)


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (3, 5), (9, 7), (8, 4)])
def test_resize_commutes_with_a_pointwise_map(grid):
    conv = torch.nn.Conv2d(3, 4, 1).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert torch.allclose(conv(resize(x, grid)), resize(conv(x), grid), atol=1e-12)
    assert resize(x, grid).shape == (2, 3, *grid)


def test_shrinking_averages():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(resize(x, (2, 2))[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))


@pytest.mark.parametrize(
    "values",
    [("NCW", 3, (2, 2)), ("NCHW", 0, (2, 2)), ("NCHW", 3, (2, -1)), ("NCHW", 3, (2, 2), 1), ("NLC", 3, (2, 2), 99)],
)
def test_refused(values):
    with pytest.raises(ValueError, match="is not a layout"):
        Layout(*values)


def test_several_tensors_read_as_one_map():
    tokens, grid = Layout("NLC", 3, (2, 2), 1), Layout("NCHW", 2, (4, 4))
    joint = JointLayout((tokens, grid))
    assert (joint.kind, joint.channels, joint.grid, joint.prefix) == ("NLC+NCHW", 5, (4, 4), 1)
    x, y = torch.randn(tokens.shape(6)), torch.randn(grid.shape(6))
    packed = torch.cat([x.flatten(1), y.flatten(1)], dim=1)
    assert packed.shape == joint.shape(6)
    assert all(torch.equal(a, b) for a, b in zip(joint.unpack(packed), (x, y), strict=True))
    spatial, prefix = joint.split(packed)
    assert torch.equal(spatial[:, 3:], y)
    assert torch.equal(spatial[:, :3], resize(tokens.split(x)[0], (4, 4)))
    assert torch.equal(prefix, torch.cat([x[:, :1], torch.zeros(6, 1, 2)], dim=2))


def test_prefix_tokens_of_several_tensors_stand_side_by_side():
    two, one = Layout("NLC", 3, (2, 2), 2), Layout("NLC", 1, (2, 2), 1)
    joint = JointLayout((two, one))
    x, y = torch.randn(two.shape(4)), torch.randn(one.shape(4))
    prefix = joint.split(torch.cat([x.flatten(1), y.flatten(1)], dim=1))[1]
    assert joint.prefix == 2 and prefix.shape == (4, 2, 4)
    assert torch.equal(prefix[:, :, :3], x[:, :2])
    assert torch.equal(prefix[:, 0, 3:], y[:, 0]) and not prefix[:, 1, 3:].any()


@pytest.mark.parametrize("data", [{"parts": []}, {"parts": [{"kind": "NCHW", "channels": 2, "grid": [2, 2]}]}])
def test_layouts_of_too_few_tensors(data):
    with pytest.raises(ValueError, match="not a layout of several tensors"):
        layout_from_dict(data)


def test_half_a_prefix_token():
    with pytest.raises(ValueError, match="is not a layout"):
        Layout("NLC", 3, (2, 2), 1.0)


@pytest.mark.parametrize("layout", [*LAYOUTS, JointLayout((LAYOUTS[0], LAYOUTS[-1]))], ids=str)
def test_layouts_survive_json(layout):
    assert layout_from_dict(json.loads(json.dumps(asdict(layout)))) == layout
