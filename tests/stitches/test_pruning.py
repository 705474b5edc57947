"""Pruned copies: the channels that go are the weakest, what is left computes the same as with zeros in their place."""

import pytest
import timm
import torch
from conftest import CLASSES, SIZE, Plain, make_anchor, spread
from torch import nn
from torch.nn.functional import conv2d
from versions import needs_new_names

from restnet_hf.anchors.anchor import Anchor
from restnet_hf.data.preprocessing import Preprocessing
from restnet_hf.stitches.pruning import CHANNEL_MULTIPLE, activation, prunable, pruned


def anchor_of(network, name="net"):
    return Anchor(spread(network), name, Preprocessing((SIZE, SIZE)))


def tiny(name, **options):
    return anchor_of(timm.create_model(name, num_classes=CLASSES, **options))


def kept(width, share):
    """So many channels stay: a multiple of eight, at least eight, and fewer than there were."""
    nearest = CHANNEL_MULTIPLE * round((1 - share) * width / CHANNEL_MULTIPLE)
    return max(CHANNEL_MULTIPLE, min(nearest, CHANNEL_MULTIPLE * ((width - 1) // CHANNEL_MULTIPLE)))


def strongest(count, *weights):
    """The channels (first dimension) of the largest norm over all weights, in order, in float64."""
    norms = sum(weight.detach().double().flatten(1).square().sum(1) for weight in weights)
    return norms.argsort(descending=True)[:count].sort().values


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("block", [2, 3])
@torch.no_grad()
def test_inverted_residual_by_hand(block, share):
    """conv_pw makes the hidden channels, conv_dw carries them, conv_pwl takes them; both BatchNorms go with them."""
    anchor = tiny("mobilenetv2_050")
    inside = [item for item in anchor.model.named_modules() if item[0].startswith(f"{anchor.cut(block).name}")]
    name, net = [item for item in inside if hasattr(item[1], "conv_pw")][-1]
    x = activation(anchor, block - 1)
    found = pruned(anchor, block, share)
    pw, dw, pwl = net.conv_pw.weight, net.conv_dw.weight, net.conv_pwl.weight
    keep = strongest(kept(len(pw), share), pw, dw, pwl.transpose(0, 1))
    assert 0 < len(keep) < len(pw)
    wanted = {"conv_pw.weight": pw[keep], "conv_dw.weight": dw[keep], "conv_pwl.weight": pwl[:, keep]}
    for norm in ("bn1", "bn2"):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            wanted[f"{norm}.{leaf}"] = getattr(net.get_submodule(norm), leaf)[keep]
    assert found.keys() == {f"{name}.{key}" for key in wanted}
    assert all(torch.equal(found[f"{name}.{key}"], value) for key, value in wanted.items())

    def norm(y, which, at):
        n = net.get_submodule(which)
        scale = n.weight[at] / (n.running_var[at] + n.eps).sqrt()
        return (y - n.running_mean[at].view(-1, 1, 1)) * scale.view(-1, 1, 1) + n.bias[at].view(-1, 1, 1)

    y = norm(conv2d(x, pw[keep]), "bn1", keep).clamp(0, 6)
    y = norm(conv2d(y, dw[keep], None, net.conv_dw.stride, 1, 1, len(keep)), "bn2", keep).clamp(0, 6)
    y = norm(conv2d(y, pwl[:, keep]), "bn3", torch.arange(len(pwl)))
    y = y + x if net.has_skip else y
    got = anchor(x, block - 1, block, lambda *span: found)
    assert torch.allclose(got, y, atol=1e-5 * y.abs().max())
    assert (got - anchor(x, block - 1, block)).abs().max() > 1e-3 * y.abs().max(), "or nothing was left out"


@pytest.mark.parametrize("share", [0.25, 0.5])
@torch.no_grad()
def test_perceptron_of_a_vit_by_hand(share):
    """fc1 makes, fc2 takes; attention and norms stay whole."""
    anchor = make_anchor("registers")
    block = anchor.model.get_submodule(anchor.cut(2).name)
    found, x = pruned(anchor, 2, share), activation(anchor, 1)
    one, two = block.mlp.fc1, block.mlp.fc2
    keep = strongest(kept(len(one.weight), share), one.weight, two.weight.T)
    name = f"{anchor.cut(2).name}.mlp"
    wanted = {
        f"{name}.fc1.weight": one.weight[keep],
        f"{name}.fc1.bias": one.bias[keep],
        f"{name}.fc2.weight": two.weight[:, keep],
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    y = x + block.attn(block.norm1(x))
    hidden = nn.functional.gelu(block.norm2(y) @ one.weight[keep].T + one.bias[keep])
    y = y + hidden @ two.weight[:, keep].T + two.bias
    assert torch.allclose(anchor(x, 1, 2, lambda *span: found), y, atol=1e-4)


@needs_new_names
@torch.no_grad()
def test_weakest_channels_go():
    """Channels that are made or taken by weights of zero are the ones that are left out, and nothing changes."""
    anchor = make_anchor("vit")
    mlp = anchor.model.get_submodule(anchor.cut(2).name).mlp
    gone = [1, 3, 4, 10, 11, 20, 33, 47]
    mlp.fc1.weight[gone], mlp.fc1.bias[gone], mlp.fc2.weight[:, gone] = 0, 9, 0
    found, x = pruned(anchor, 2, 8 / 48), activation(anchor, 1)
    name = f"{anchor.cut(2).name}.mlp"
    stay = [channel for channel in range(48) if channel not in gone]
    assert torch.equal(found[f"{name}.fc1.weight"], mlp.fc1.weight[stay])
    whole = anchor(x, 1, 2)
    assert torch.allclose(anchor(x, 1, 2, lambda *span: found), whole, atol=1e-5 * whole.abs().max())


@torch.no_grad()
def test_squeeze_and_excite_goes_with_its_channels():
    """The gate squeezes and widens the hidden channels, so both its layers lose them, and its own middle thins out."""
    anchor = make_anchor("mobilenet")
    block, name = 5, anchor.cut(5).name
    net = anchor.model.get_submodule(name)
    found = pruned(anchor, block, 0.5)
    pw, dw, pwl = net.conv_pw.weight, net.conv_dw.weight, net.conv_pwl.weight
    reduce, expand = net.se.conv_reduce, net.se.conv_expand
    wide = strongest(kept(len(pw), 0.5), pw, dw, expand.weight, pwl.transpose(0, 1), reduce.weight.transpose(0, 1))
    thin = strongest(kept(len(reduce.weight), 0.5), reduce.weight, expand.weight.transpose(0, 1))
    assert torch.equal(found[f"{name}.se.conv_reduce.weight"], reduce.weight[thin][:, wide])
    assert torch.equal(found[f"{name}.se.conv_expand.weight"], expand.weight[wide][:, thin])
    assert torch.equal(found[f"{name}.se.conv_reduce.bias"], reduce.bias[thin])
    assert torch.equal(found[f"{name}.conv_dw.weight"], dw[wide])
    x = activation(anchor, block - 1)
    before = {key: value.clone() for key, value in anchor.state_dict().items()}
    zeroed = {f"{name}.conv_pwl.weight": torch.zeros_like(pwl).index_copy(1, wide, pwl[:, wide])}
    for layer, keep, path in ((reduce, wide, "conv_reduce"), (expand, thin, "conv_expand")):
        weight = torch.zeros_like(layer.weight).index_copy(1, keep, layer.weight[:, keep])
        zeroed[f"{name}.se.{path}.weight"] = weight
    got, wanted = (anchor(x, block - 1, block, lambda *span, t=t: t) for t in (found, zeroed))
    assert torch.allclose(got, wanted, atol=1e-5 * wanted.abs().max())
    assert all(torch.equal(value, before[key]) for key, value in anchor.state_dict().items())
    assert net.conv_dw.groups == len(dw), "the depthwise convolution is whole again"


@pytest.mark.parametrize("name", ["mobilenet", "resnet", "vit", "swin_nhwc", "registers", "distilled", "swin", "tnt"])
@torch.no_grad()
def test_every_piece_keeps_its_layout(anchors, name):
    """What can be pruned gives the same layout from fewer weights, more of them at a smaller share."""
    anchor = anchors[name]
    blocks = [block for block in range(2, anchor.depth + 1) if prunable(anchor, block)]
    assert blocks, "or this shows nothing"
    for block in blocks[:3]:
        x = activation(anchor, block - 1)
        sizes = [sum(tensor.numel() for tensor in anchor.own_parameters(block - 1, block).values())]
        for share in (0.25, 0.75):
            found = pruned(anchor, block, share)
            assert anchor(x, block - 1, block, lambda *span, f=found: f).shape == anchor.layout(block).shape(1)
            own = {**anchor.own_parameters(block - 1, block), **found}
            sizes.append(sum(tensor.numel() for tensor in own.values() if isinstance(tensor, nn.Parameter)))
        assert sizes[0] > sizes[1] >= sizes[2]


@pytest.mark.parametrize("name", ["mobilenet", "vit", "tnt"])
def test_half_floats_prune_what_floats_do(name):
    """A model that is saved in one type and loaded in another needs the same shapes."""
    single, half = make_anchor(name), make_anchor(name)
    half.to(torch.bfloat16)
    for block in (2, 3):
        mine, theirs = ({key: value.shape for key, value in pruned(a, block, 0.5).items()} for a in (half, single))
        assert mine == theirs
        assert {value.dtype for value in pruned(half, block, 0.5).values()} == {torch.bfloat16}


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.95])
def test_all_shares_prune_the_same_blocks(share):
    """However few channels are to go, some do; where no more than eight are there, none can."""
    anchor = make_anchor("mobilenet")
    for block in range(2, anchor.depth + 1):
        if prunable(anchor, block):
            for key, tensor in pruned(anchor, block, share).items():
                path, _, leaf = key.rpartition(".")
                old = getattr(anchor.model.get_submodule(path), leaf)
                assert tensor.numel() < old.numel() and max(tensor.shape) >= CHANNEL_MULTIPLE
        else:
            with pytest.raises(ValueError, match="no hidden channels"):
                pruned(anchor, block, share)


class Carried(nn.Module):
    """Hidden channels that something else reads too: their mean, or the way past the block."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.wide, self.act, self.thin = nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 1)
        self.norm = nn.GroupNorm(1, 32)

    def forward(self, x):
        y = self.act(self.wide(x))
        if self.how == "norm":  # over all channels together
            return x + self.thin(self.norm(y))
        z = self.thin(y)
        if self.how == "mean":
            return z + y.mean(1, keepdim=True)
        if self.how == "past":
            return z + y[:, :16]
        return x + z


class Stack(nn.Module):
    """Three such blocks."""

    def __init__(self, how):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 8, 1)
        self.blocks = nn.Sequential(*(Carried(how) for _ in range(3)))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize(("how", "fits"), [("alone", True), ("mean", False), ("past", False), ("norm", False)])
def test_channels_that_others_read_are_not_hidden(how, fits):
    anchor = anchor_of(Stack(how), how)
    blocks = [number for number, cut in enumerate(anchor.cuts, 1) if cut.name.startswith("blocks") and number > 1]
    assert blocks and {prunable(anchor, block) for block in blocks} == {fits}


def test_refused():
    anchor = anchor_of(Plain())
    with pytest.raises(ValueError, match=r"the block of 'net' that ends in cut 2 has no hidden channels"):
        pruned(anchor, 2, 0.5)
    assert not prunable(anchor, 1), "before the first cut there is the image"
    for share in (0.0, 1.0, -0.5, 25):
        with pytest.raises(ValueError, match=f"above 0 and below 1, not {share}"):
            pruned(make_anchor("vit"), 2, share)
