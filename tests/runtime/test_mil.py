"""The evaluator of Core ML's programs, against PyTorch: operations, modules as coremltools writes them, files."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from versions import needs_export

from restnet_hf.export.coreml import CoreMlExporter
from restnet_hf.export.programs import Program
from restnet_hf.runtime.mil import MilProgram
from restnet_hf.runtime.mil_operations import OPERATIONS, affine_dequantize, gelu
from restnet_hf.runtime.runners import read_mil


pytestmark = needs_export
OTHERS = {  # kernel, options of the convolution in torch, parameters of ours
    "plain": ((8, 6, 3, 3), {}, {}),
    "strided": ((8, 6, 3, 3), {"stride": 2, "padding": 1}, {"strides": [2, 2], "pad_type": "custom", "pad": [1] * 4}),
    "pointwise": ((8, 6, 1, 1), {"stride": 2}, {"strides": [2, 2]}),
    "grouped": ((8, 3, 3, 3), {"groups": 2}, {"groups": 2}),
    "depthwise": ((6, 1, 5, 5), {"groups": 6, "padding": 2}, {"groups": 6, "pad_type": "same"}),
    "two for each channel": ((12, 1, 3, 3), {"groups": 6}, {"groups": 6}),
    "dilated": ((8, 6, 3, 3), {"dilation": (2, 3)}, {"dilations": [2, 3]}),
    "oblong": ((8, 6, 1, 3), {"padding": (0, 1)}, {"pad_type": "custom", "pad": [0, 0, 1, 1]}),
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found, expected, tolerance=1e-5):
    assert found.shape == tuple(expected.shape)
    return np.abs(found - expected.numpy()).max() <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", OTHERS)
def test_convolutions(name):
    shape, options, parameters = OTHERS[name]
    x, weight, bias = noise(2, 6, 13, 11), noise(*shape, seed=1), noise(shape[0], seed=2)
    found = OPERATIONS["conv"](x.numpy(), weight.numpy(), bias.numpy(), **parameters)
    assert close(found, F.conv2d(x, weight, bias, **options))


def test_convolutions_of_sequences():
    x, weight = noise(2, 6, 13), noise(4, 6, 3, seed=1)
    assert close(OPERATIONS["conv"](x.numpy(), weight.numpy(), strides=[2]), F.conv1d(x, weight, stride=2))


@pytest.mark.parametrize("size", [10, 11, 13])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pools(size, kernel, ceil_mode):
    x, margin = noise(2, 3, size, size), kernel // 2
    ours = {"kernel_sizes": [kernel] * 2, "strides": [2, 2], "pad_type": "custom", "pad": [margin] * 4}
    expected = F.max_pool2d(x, kernel, 2, margin, ceil_mode=ceil_mode)
    assert close(OPERATIONS["max_pool"](x.numpy(), **ours, ceil_mode=ceil_mode), expected)
    expected = F.avg_pool2d(x, kernel, 2, margin, ceil_mode, count_include_pad=False)
    found = OPERATIONS["avg_pool"](x.numpy(), **ours, ceil_mode=ceil_mode, exclude_padding_from_average=True)
    assert close(found, expected)
    if not ceil_mode:
        assert close(OPERATIONS["avg_pool"](x.numpy(), **ours), F.avg_pool2d(x, kernel, 2, margin))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("elu", lambda x: F.elu(x, 0.7)),
        ("erf", torch.erf),
        ("leaky_relu", lambda x: F.leaky_relu(x, 0.7)),
        ("relu", F.relu),
        ("relu6", F.relu6),
        ("sigmoid", torch.sigmoid),
        ("sigmoid_hard", lambda x: (0.7 * x + 0.2).clamp(0, 1)),
        ("silu", F.silu),
        ("softplus", F.softplus),
        ("tanh", torch.tanh),
    ],
)
def test_activations(name, function):
    x = torch.linspace(-12, 12, 2001)
    more = {"elu": {"alpha": 0.7}, "leaky_relu": {"alpha": 0.7}, "sigmoid_hard": {"alpha": 0.7, "beta": 0.2}}
    assert close(OPERATIONS[name](x.numpy(), **more.get(name, {})), function(x), 1e-6)


def test_forms_of_gelu():
    x = torch.linspace(-8, 8, 1001)
    assert close(gelu(x.numpy(), "EXACT"), F.gelu(x), 1e-6)
    assert close(gelu(x.numpy(), "TANH_APPROXIMATION"), F.gelu(x, approximate="tanh"), 1e-6)
    assert close(gelu(x.numpy(), "SIGMOID_APPROXIMATION"), x * torch.sigmoid(1.702 * x), 1e-6)
    with pytest.raises(NotImplementedError, match="'gelu' of mode 'X' is not evaluated"):
        gelu(x.numpy(), "X")


def test_weights_in_eight_bits():
    """Against PyTorch's own rounding to a scale for each channel."""
    x, scales, zeros = noise(3, 4, 2), torch.tensor([0.1, 0.02, 3.0]), torch.tensor([3, -5, 0])
    expected = torch.fake_quantize_per_channel_affine(x, scales, zeros.int(), 0, -128, 127)
    quantised = (x / scales[:, None, None] + zeros[:, None, None]).round().clamp(-128, 127).to(torch.int8)
    found = affine_dequantize(quantised.numpy(), zeros.to(torch.int8).numpy(), scales.numpy(), 0)
    assert close(found, expected, 1e-6)
    one = affine_dequantize(np.int8([[1, 2]]), np.int8(1), np.float32(0.5), 0)
    assert one.tolist() == [[0.0, 0.5]]


class Many(nn.Module):
    """Operations on shapes and numbers that classifiers are made of."""

    def forward(self, x):
        a, b, c = x.split([4, 8, 4], 1)
        mean = b[:, :, :, 1:-1].mean((2, 3), keepdim=True)
        x = torch.cat([a * b[:, ::2], c - b[:, 4:], mean.expand(-1, -1, 8, 8)], 1)
        x = F.pad(x, (1, 2, 0, 1)) / (x.abs().amax(1, keepdim=True).sum((2, 3), keepdim=True) + 1.5)
        x = torch.stack([x.square().sqrt(), torch.rsqrt(x.pow(2) + 0.5), x.exp().clamp(0.5, 1.5)], 1)
        x = x.flatten(1, 2).transpose(1, 2).reshape(x.shape[0], -1, 6)
        x = torch.softmax(x @ x.transpose(1, 2) / 9, -1) @ x
        return x[:, torch.tensor([0, 2, 1])].unsqueeze(1).squeeze(1)[:, -1] + x.min(1).values + x.norm(2, 1)


class Attention(nn.Module):
    """What a transformer does, with a token in front and a table of positions."""

    def __init__(self):
        super().__init__()
        self.token, self.norm = nn.Parameter(noise(1, 1, 16)), nn.LayerNorm(16, eps=1e-6)
        self.heads, self.out = nn.Linear(16, 48), nn.Linear(16, 5)
        self.positions = nn.Parameter(noise(1, 65, 16, seed=1))

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1) + self.positions
        q, k, v = self.heads(self.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(F.gelu(x)[:, 0])


def convolutional(*layers):
    return nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


torch.manual_seed(0)  # of the weights below
MODULES = {
    "many": Many(),
    "attention": Attention(),
    "norms": convolutional(
        nn.BatchNorm2d(12), nn.ReLU6(), nn.GroupNorm(3, 12), nn.InstanceNorm2d(12, affine=True), nn.ReLU()
    ),
    "a norm before": nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 5)),
    "activations": convolutional(
        nn.SiLU(), nn.GELU(approximate="tanh"), nn.Hardswish(), nn.PReLU(12), nn.Hardsigmoid()
    ),
    "more activations": convolutional(nn.ELU(), nn.LeakyReLU(0.1), nn.Mish(), nn.Sigmoid(), nn.Tanh(), nn.Hardtanh()),
    "pools": convolutional(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2, count_include_pad=False, ceil_mode=True)),
    "growing": convolutional(nn.Upsample((12, 12), mode="bilinear"), nn.Upsample(scale_factor=2, mode="nearest")),
    "shrinking": convolutional(nn.AdaptiveAvgPool2d(4), nn.Softmax(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d(2)),
}


def programmed(module, x, folder, precision="fp32"):
    """A module as a package, and the package as a program that is evaluated."""
    pytest.importorskip("coremltools")
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean = noise(each.num_features, seed=3)
            each.running_var = noise(each.num_features, seed=4).exp()
    module = module.eval().requires_grad_(False)
    exporter = CoreMlExporter()
    program = Program("route", module, torch.export.export(module, (x,), strict=False), x, (), 0)
    (entry,) = exporter.save({"route": exporter.convert(program, precision)}, folder).values()
    spec = read_mil(folder, entry)
    return MilProgram(spec, folder / entry["weights"] if "weights" in entry else None), entry


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_modules(tmp_path, name):
    """As coremltools writes them, in float32 and float16."""
    x, module = noise(2, 16, 8, 8), MODULES[name]
    full, _ = programmed(module, x, tmp_path)
    expected = module(x)
    assert full.input_shape == (2, 16, 8, 8) and close(full(x.numpy()), expected, 1e-5)
    (tmp_path / "half").mkdir()
    half, _ = programmed(module, x, tmp_path / "half", "fp16")
    found = half(x.numpy())
    assert found.dtype == np.float32 and close(found, expected, 0.02) and not close(found, expected, 1e-6)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    return folder, programmed(MODULES["norms"], noise(2, 16, 8, 8), folder)[1]


def test_numbers_are_rounded_where_the_program_has_half_precision(tmp_path):
    """As PyTorch rounds them: the sum of two numbers in float16."""

    class Sum(nn.Module):
        def forward(self, x):
            return x.flatten(1) + 0.1

    x = noise(2, 1, 20, 20)
    program, _ = programmed(Sum(), x, tmp_path, "fp16")
    assert np.array_equal(program(x.numpy()), (x.half() + torch.tensor(0.1).half()).float().flatten(1).numpy())


def test_operations_that_are_not_known(package):
    folder, entry = package
    spec = read_mil(folder, entry)
    operations = spec.mlProgram.functions["main"].block_specializations["CoreML7"].operations
    next(each for each in operations if each.type == "conv").type = "conv_of_tomorrow"
    with pytest.raises(NotImplementedError, match="operation 'conv_of_tomorrow' is not among those .*'avg_pool'"):
        MilProgram(spec, folder / entry["weights"])


def test_sizes_are_checked(package):
    folder, entry = package
    program = MilProgram(read_mil(folder, entry), folder / entry["weights"])
    with pytest.raises(ValueError, match=r"takes images of shape \(2, 16, 8, 8\), not \(1, 16, 8, 8\)"):
        program(np.zeros((1, 16, 8, 8), np.float32))


@pytest.mark.parametrize("change", ["offset", "far", "file", "size", "missing"])
def test_weights_that_are_not_there(package, tmp_path, change):
    """A graph cannot read outside of its file of weights, nor another file."""
    folder, entry = package
    spec, weights = read_mil(folder, entry), tmp_path / "weight.bin"
    weights.write_bytes((folder / entry["weights"]).read_bytes())
    operations = spec.mlProgram.functions["main"].block_specializations["CoreML7"].operations
    value = next(
        each.attributes["val"]
        for each in operations
        if each.type == "const" and each.attributes["val"].WhichOneof("value") == "blobFileValue"
    )
    place = value.blobFileValue
    if change == "offset":
        place.offset += 64
    elif change == "far":
        place.offset = 2**63
    elif change == "file":
        place.fileName = "@model_path/../../../../etc/passwd"
    elif change == "size":
        value.type.tensorType.dimensions[0].constant.size = 2**40
    with pytest.raises(ValueError, match="weight at .* (is not of|is not in)"):
        MilProgram(spec, None if change == "missing" else weights)
