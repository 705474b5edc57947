"""OPERATIONS: the operations of Core ML's model intermediate language, in numpy. No torch here."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np


Operation = Callable[..., Any]
"""A function of the operation's parameters, by their names in the language, whose numbers are in float32."""
ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _ints(values: Any) -> list[int]:
    return [int(value) for value in np.ravel(values)]


def _window(
    x: np.ndarray,
    kernel: Sequence[int],
    strides: Any,
    pad_type: str,
    pad: Any,
    fill: float,
    dilations: Any = None,
    ceil_mode: bool = False,
) -> tuple[np.ndarray, list[tuple[slice, ...]]]:
    """A padded array (N, C, ...), and its slice for each place in a window of a convolution or pooling."""
    count = len(kernel)
    steps, gaps = (_ints(each) if each is not None else [1] * count for each in (strides, dilations))
    reach = [gap * (size - 1) + 1 for gap, size in zip(gaps, kernel, strict=True)]
    if pad_type == "custom":
        flat = _ints(pad)
        margins = [*zip(flat[::2], flat[1::2], strict=True)]
    elif pad_type == "valid":
        margins = [(0, 0)] * count
    elif pad_type in ("same", "same_lower"):
        missing = [
            max(0, (-(-size // step) - 1) * step + far - size)
            for size, step, far in zip(x.shape[2:], steps, reach, strict=True)
        ]
        halves = [(each // 2, each - each // 2) for each in missing]
        margins = halves if pad_type == "same" else [(after, before) for before, after in halves]
    else:
        raise NotImplementedError(f"padding of type {pad_type!r} is not evaluated")
    free = [
        size + before + after - far for size, (before, after), far in zip(x.shape[2:], margins, reach, strict=True)
    ]
    if min(free) < 0:
        raise ValueError(f"a window of {reach} is larger than what it runs over, {x.shape[2:]}")
    counts = [each // step + 1 for each, step in zip(free, steps, strict=True)]
    if ceil_mode:
        for axis, (each, step) in enumerate(zip(free, steps, strict=True)):
            if each % step and counts[axis] * step < x.shape[2 + axis] + margins[axis][0]:  # begins before the end
                margins[axis] = (margins[axis][0], margins[axis][1] + step - each % step)
                counts[axis] += 1
    padded = np.pad(x, [(0, 0), (0, 0), *margins], constant_values=fill) if any(map(any, margins)) else x
    places = []
    for place in product(*map(range, kernel)):
        starts = [at * gap for at, gap in zip(place, gaps, strict=True)]
        ends = [start + step * (n - 1) + 1 for start, step, n in zip(starts, steps, counts, strict=True)]
        places.append((slice(None), slice(None), *map(slice, starts, ends, steps)))
    return padded, places


def conv(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> np.ndarray:
    """Convolution of (N, C, ...) with weights (O, C / groups, ...), as a sum of products over places in the kernel."""
    groups, (outs, ins, *kernel) = int(groups), weight.shape
    padded, places = _window(x, kernel, strides, pad_type, pad, 0.0, dilations)
    first = padded[places[0]]
    size, many = first.shape[2:], len(x)
    taps = np.ascontiguousarray(weight.reshape(groups, outs // groups, ins, -1).transpose(3, 0, 1, 2))
    total = np.zeros((many, groups, outs // groups, math.prod(size)), np.float32)
    for tap, place in zip(taps, places, strict=True):
        part = padded[place].reshape(many, groups, ins, -1)
        total += tap * part if ins == 1 else tap @ part
    y = total.reshape(many, outs, *size)
    return y if bias is None else y + bias.reshape(-1, *[1] * len(size))


def max_pool(
    x: np.ndarray, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any = None, ceil_mode: Any = False
) -> np.ndarray:
    """Largest numbers of windows."""
    padded, places = _window(x, _ints(kernel_sizes), strides, pad_type, pad, -np.inf, None, bool(ceil_mode))
    y = padded[places[0]]
    for place in places[1:]:
        y = np.maximum(y, padded[place])
    return y


def avg_pool(
    x: np.ndarray,
    kernel_sizes: Any,
    strides: Any,
    pad_type: str,
    pad: Any = None,
    exclude_padding_from_average: Any = False,
    ceil_mode: Any = False,
) -> np.ndarray:
    """Means of windows."""
    kernel = _ints(kernel_sizes)
    if ceil_mode and not exclude_padding_from_average:
        raise NotImplementedError("'avg_pool' with ceil_mode that averages padding is not evaluated")
    padded, places = _window(x, kernel, strides, pad_type, pad, 0.0, None, bool(ceil_mode))
    total = sum(padded[place] for place in places)
    if not exclude_padding_from_average:
        return np.asarray(total / np.float32(math.prod(kernel)))
    ones, _ = _window(np.ones_like(x[:1, :1]), kernel, strides, pad_type, pad, 0.0, None, bool(ceil_mode))
    return np.asarray(total / sum(ones[place] for place in places))


def erf(x: np.ndarray) -> np.ndarray:
    """The error function, with an error of at most 1.5e-7 (Abramowitz and Stegun 1964, formula 7.1.26)."""
    t = 1 / (1 + np.float32(0.3275911) * np.abs(x))
    series = t * sum(np.float32(factor) * t**power for power, factor in enumerate(ERF))
    return np.sign(x) * (1 - series * np.exp(-x * x))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))


def gelu(x: np.ndarray, mode: str = "EXACT") -> np.ndarray:
    """Gaussian error linear units in one of three forms."""
    if mode == "EXACT":
        return np.float32(0.5) * x * (1 + erf(x * np.float32(math.sqrt(0.5))))
    if mode == "TANH_APPROXIMATION":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
        return np.float32(0.5) * x * (1 + np.tanh(inner))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    raise NotImplementedError(f"'gelu' of mode {mode!r} is not evaluated")


def softmax(x: np.ndarray, axis: Any = -1) -> np.ndarray:
    """Exponentials that add up to one along an axis."""
    y = np.exp(x - x.max(int(axis), keepdims=True))
    return y / y.sum(int(axis), keepdims=True)


def _channels(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *[1] * (x.ndim - 2))


def batch_norm(
    x: np.ndarray, mean: Any, variance: Any, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5
) -> np.ndarray:
    """Normalisation of (N, C, ...) by the given statistics of channels."""
    scale = 1 / np.sqrt(variance + epsilon) * (1 if gamma is None else gamma)
    return (x - _channels(mean, x)) * _channels(scale, x) + (0 if beta is None else _channels(beta, x))


def layer_norm(x: np.ndarray, axes: Any, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> np.ndarray:
    """Normalisation over axes by their own statistics."""
    over = tuple(_ints(axes))
    centred = x - x.mean(over, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(over, keepdims=True) + epsilon)
    shape = [x.shape[axis] if axis in {each % x.ndim for each in over} else 1 for axis in range(x.ndim)]
    y = y if gamma is None else y * np.reshape(gamma, shape)
    return y if beta is None else y + np.reshape(beta, shape)


def instance_norm(x: np.ndarray, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> np.ndarray:
    """Normalisation of each channel of each image by its own statistics."""
    y = layer_norm(x, range(2, x.ndim), None, None, epsilon)
    y = y if gamma is None else y * _channels(gamma, x)
    return y if beta is None else y + _channels(beta, x)


def linear(x: np.ndarray, weight: np.ndarray, bias: Any = None) -> np.ndarray:
    """Products with weights (O, I) over the last axis."""
    y = x @ weight.T
    return y if bias is None else y + bias


def matmul(x: np.ndarray, y: np.ndarray, transpose_x: Any = False, transpose_y: Any = False) -> np.ndarray:
    """Matrix products over the last two axes."""
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)


def reshape(x: np.ndarray, shape: Any) -> np.ndarray:
    """Other sizes, where 0 is the size that the input has and -1 what is left."""
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(_ints(shape))])


def slice_by_index(
    x: np.ndarray,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> np.ndarray:
    """Slices as in Python; a set mask leaves out the begin or end, or takes the begin alone without its axis."""
    count, place = x.ndim, list[Any]()
    begins, ends = _ints(begin), _ints(end)
    steps = [1] * count if stride is None else _ints(stride)
    no_begin, no_end, alone = (
        [False] * count if mask is None else [bool(each) for each in np.ravel(mask)]
        for mask in (begin_mask, end_mask, squeeze_mask)
    )
    for axis in range(count):
        if alone[axis]:
            place.append(begins[axis])
        else:
            first, last = None if no_begin[axis] else begins[axis], None if no_end[axis] else ends[axis]
            place.append(slice(first, last, steps[axis]))
    return np.asarray(x[tuple(place)])


def slice_by_size(x: np.ndarray, begin: Any, size: Any) -> np.ndarray:
    """Slices by begin and size, where -1 is all that is left."""
    pairs = zip(_ints(begin), _ints(size), strict=True)
    return x[tuple(slice(first, None if many == -1 else first + many) for first, many in pairs)]


def split(x: np.ndarray, axis: Any, num_splits: Any = None, split_sizes: Any = None) -> list[np.ndarray]:
    """Parts along an axis."""
    if split_sizes is None:
        return np.split(x, int(num_splits), int(axis))
    return np.split(x, np.cumsum(_ints(split_sizes))[:-1], int(axis))


def concat(values: list[np.ndarray], axis: Any, interleave: Any = False) -> np.ndarray:
    """Arrays one after the other along an axis."""
    if interleave:
        raise NotImplementedError("'concat' with interleave is not evaluated")
    return np.concatenate(values, int(axis))


def gather(
    x: np.ndarray, indices: Any, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False
) -> np.ndarray:
    """Entries of an axis by their indices."""
    if batch_dims:
        raise NotImplementedError("'gather' with batch_dims is not evaluated")
    return np.asarray(np.take(x, np.asarray(indices).astype(np.int64), int(axis)))


def pad(x: np.ndarray, pad: Any, mode: str = "constant", constant_val: Any = 0.0) -> np.ndarray:
    """Margins around the last axes."""
    flat = _ints(pad)
    pairs = [*zip(flat[::2], flat[1::2], strict=True)]
    margins = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    if mode == "constant":
        return np.pad(x, margins, constant_values=constant_val)
    if mode in ("reflect", "replicate"):
        return np.pad(x, margins, "reflect" if mode == "reflect" else "edge")
    raise NotImplementedError(f"'pad' of mode {mode!r} is not evaluated")


def upsample_bilinear(
    x: np.ndarray,
    scale_factor_height: Any,
    scale_factor_width: Any,
    align_corners: Any = True,
    half_pixel_centers: Any = None,
) -> np.ndarray:
    """Images (N, C, H, W) that are interpolated to larger ones."""
    half = not align_corners if half_pixel_centers is None else bool(half_pixel_centers)
    for axis, factor in ((2, scale_factor_height), (3, scale_factor_width)):
        old = x.shape[axis]
        new = int(old * float(factor) + 1e-4)
        if align_corners:
            at = np.arange(new) * ((old - 1) / max(new - 1, 1))
        else:
            at = (np.arange(new) + 0.5) * (old / new) - 0.5 if half else np.arange(new) * (old / new)
        at = at.clip(0, old - 1)
        low = np.floor(at).astype(int)
        share = (at - low).astype(np.float32).reshape([-1 if each == axis else 1 for each in range(4)])
        x = x.take(low, axis) * (1 - share) + x.take(np.minimum(low + 1, old - 1), axis) * share
    return x


def upsample_nearest_neighbor(x: np.ndarray, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> np.ndarray:
    """Images (N, C, H, W) whose pixels are repeated."""
    for axis, factor in ((2, scale_factor_height), (3, scale_factor_width)):
        new = int(x.shape[axis] * float(factor) + 1e-4)
        x = x.take(np.floor(np.arange(new) / float(factor)).astype(int), axis)
    return x


def affine_dequantize(quantized_data: np.ndarray, zero_point: Any, scale: Any, axis: Any) -> np.ndarray:
    """Weights in eight bits as numbers: (q - zero point) * scale, by the channels of an axis."""
    shape = [1] * quantized_data.ndim
    if np.size(scale) > 1 or np.size(zero_point) > 1:
        shape[int(axis)] = -1
    zero, factor = (np.asarray(each, np.float32) for each in (zero_point, scale))
    zero, factor = (each.reshape(shape) if each.size > 1 else each.reshape(()) for each in (zero, factor))
    return (quantized_data.astype(np.float32) - zero) * factor


def _reduction(function: Callable[..., Any]) -> Operation:
    """An operation that reduces axes, all where none are given."""

    def reduce(x: np.ndarray, axes: Any = None, keep_dims: Any = False) -> np.ndarray:
        over = None if axes is None or np.size(axes) == 0 else tuple(_ints(axes))
        return np.asarray(function(x, axis=over, keepdims=bool(keep_dims)))

    return reduce


def _unary(function: Callable[..., Any]) -> Operation:
    return lambda x: np.asarray(function(x))


def _binary(function: Callable[..., Any]) -> Operation:
    return lambda x, y: np.asarray(function(x, y))


CONSTANT: dict[str, Operation] = {
    "const": lambda val: val,
    "constexpr_affine_dequantize": affine_dequantize,
}
"""Operations that are evaluated once, when a program is loaded."""

OPERATIONS: dict[str, Operation] = {
    "abs": _unary(np.abs),
    "add": _binary(np.add),
    "avg_pool": avg_pool,
    "batch_norm": batch_norm,
    "cast": lambda x, dtype: x,  # the result has its type in the graph
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "concat": concat,
    "conv": conv,
    "elu": lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),
    "erf": erf,
    "exp": _unary(np.exp),
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(_ints(axes))),
    "floor": _unary(np.floor),
    "gather": gather,
    "gelu": gelu,
    "identity": lambda x: x,
    "instance_norm": instance_norm,
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "layer_norm": layer_norm,
    "leaky_relu": lambda x, alpha: np.where(x > 0, x, alpha * x),
    "linear": linear,
    "log": lambda x, epsilon=1e-45: np.log(x + np.float32(epsilon)),
    "matmul": matmul,
    "max_pool": max_pool,
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "mul": _binary(np.multiply),
    "pad": pad,
    "pow": _binary(np.power),
    "prelu": lambda x, alpha: np.where(x > 0, x, _channels(alpha, x) * x),
    "real_div": _binary(np.divide),
    "reduce_l2_norm": _reduction(lambda x, **how: np.sqrt(np.square(x).sum(**how))),
    "reduce_max": _reduction(np.maximum.reduce),
    "reduce_mean": _reduction(np.mean),
    "reduce_min": _reduction(np.minimum.reduce),
    "reduce_sum": _reduction(np.sum),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "reshape": reshape,
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + np.float32(epsilon)),
    "sigmoid": sigmoid,
    "sigmoid_hard": lambda x, alpha=0.2, beta=0.5: np.clip(alpha * x + beta, 0, 1),
    "silu": lambda x: x * sigmoid(x),
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "softmax": softmax,
    "softplus": lambda x: np.logaddexp(x, np.float32(0)),
    "split": split,
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "squeeze": lambda x, axes=None: np.squeeze(x, None if axes is None else tuple(_ints(axes))),
    "stack": lambda values, axis: np.stack(values, int(axis)),
    "sub": _binary(np.subtract),
    "tanh": _unary(np.tanh),
    "thresholded_relu": lambda x, alpha=1.0: np.where(x >= alpha, x, 0),
    "tile": lambda x, reps: np.tile(x, _ints(reps)),
    "transpose": lambda x, perm: x.transpose(_ints(perm)),
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
"""Operations of Core ML's model intermediate language that are evaluated, by name; a new one is one more row."""
