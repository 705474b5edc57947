"""Stitches folded into what follows: the same function, fewer multiply-accumulates, or left alone."""

import pytest
import torch
from torch import nn

from restnet_hf.anchors.layouts import Layout
from restnet_hf.export.folding import fold_stitches, merge_stitches
from restnet_hf.export.programs import ExportedRoute
from restnet_hf.profiling.macs import count_macs
from restnet_hf.stitches.layers import STITCHES, StitchConfig


GRID = (8, 8)
MAP, WIDE = Layout("NCHW", 6, GRID), Layout("NCHW", 16, GRID)
TOKENS, MERGED = Layout("NHWC", 6, GRID), Layout("NHWC", 16, GRID)


class Both(nn.Module):
    """The beginning of a ResNet's stage: two ways, each through a convolution that takes no more than it is given."""

    def __init__(self, stride=2):
        super().__init__()
        self.main, self.short = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1, stride, bias=False)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.main(x).relu()) + self.short(x)


class Residual(nn.Module):
    """A way on which the stitch's output itself is needed."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.conv(x) + x[:, :4]


class Merge(nn.Module):
    """Swin's, version 2: four neighbours side by side, through one linear layer before the norm."""

    def __init__(self):
        super().__init__()
        self.reduction, self.norm = nn.Linear(64, 8), nn.LayerNorm(8)

    def forward(self, x):
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.norm(self.reduction(x))


ENDS = {  # what follows, the layouts that the stitch joins, and whether it can be folded
    "one convolution": (lambda: nn.Conv2d(16, 4, 1), MAP, WIDE, True),
    "patches": (lambda: nn.Conv2d(16, 4, 2, 2), MAP, WIDE, True),
    "two ways": (Both, MAP, WIDE, True),
    "linear": (lambda: nn.Linear(16, 4), TOKENS, MERGED, True),
    "patch merge": (Merge, TOKENS, MERGED, True),
    "smaller map": (lambda: nn.Conv2d(16, 4, 1), Layout("NCHW", 6, (16, 16)), WIDE, True),
    "larger map": (lambda: nn.Conv2d(16, 4, 1), Layout("NCHW", 6, (4, 4)), WIDE, False),
    "from maps to tokens": (lambda: nn.Linear(16, 4), MAP, MERGED, True),
    "padded": (lambda: nn.Conv2d(16, 4, 3, padding=1), MAP, WIDE, False),
    "groups": (lambda: nn.Conv2d(16, 16, 1, groups=4), MAP, WIDE, False),
    "residual": (Residual, MAP, WIDE, False),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)), MAP, WIDE, False),
    "wider": (lambda: nn.Conv2d(2, 64, 1), MAP, Layout("NCHW", 2, GRID), False),
}


def folded(stitch, end, source):
    torch.manual_seed(0)
    steps = nn.Sequential(stitch, end()).eval()
    x = torch.randn(source.shape(2))
    before, macs = steps.double()(x.double()), count_macs(steps.float(), x)
    count = fold_stitches(steps, x, torch.export.export(ExportedRoute(steps), (x,), strict=False))
    assert torch.allclose(steps.double()(x.double()), before, rtol=1e-5, atol=1e-5)
    return count, count_macs(steps.float(), x) / macs


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("kind", ["linear", "lora"])
def test_folds_where_it_is_exact_and_cheaper(name, kind):
    end, source, target, folds = ENDS[name]
    stitch = STITCHES[kind](source, target, StitchConfig.from_dict({"kind": kind, "r": 2}))
    if kind == "lora":
        nn.init.normal_(stitch.B.weight)
        steps = nn.Sequential(stitch)
        x = torch.randn(source.shape(2))
        expected = stitch(x)
        merge_stitches(steps)
        assert torch.allclose(steps(x), expected, atol=1e-5) and count_macs(steps, x) < count_macs(stitch, x)
        (stitch,) = steps
    count, share = folded(stitch, end, source)
    assert count == folds and (share < 1) == folds


def test_what_is_no_affine_map_stays():
    stitch = STITCHES["mlp"](MAP, WIDE, StitchConfig("mlp"))
    nn.init.normal_(stitch.out.weight)
    assert folded(stitch, ENDS["one convolution"][0], MAP) == (0, 1)
