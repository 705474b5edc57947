"""MilProgram: evaluates a program of Core ML in numpy, where Core ML itself does not run. No torch here."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from restnet_hf.runtime.mil_operations import CONSTANT, OPERATIONS


TYPES = {  # of coremltools' MIL.proto, `DataType`
    1: np.bool_,
    10: np.float16,
    11: np.float32,
    12: np.float64,
    21: np.int8,
    22: np.int16,
    23: np.int32,
    24: np.int64,
    31: np.uint8,
    32: np.uint16,
    33: np.uint32,
    34: np.uint64,
}
STRING = 2
BLOB = np.dtype([("sentinel", "<u4"), ("type", "<u4"), ("size", "<u8"), ("offset", "<u8"), ("rest", "V40")])
SENTINEL = 0xDEADBEEF  # with which the description of each tensor in a file of weights begins
WEIGHTS = "@model_path/weights/weight.bin"
SEVERAL = "values"  # parameter that takes several values


@dataclass(frozen=True)
class Call:
    """One operation of a program.

    Args:
        kind: name of the operation.
        inputs: names of the values of each parameter.
        outputs: name, numpy's type and shape of each result.
        last: names of the values that no later operation reads.
    """

    kind: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: tuple[tuple[str, Any, tuple[int, ...]], ...]
    last: tuple[str, ...]


class MilProgram:
    """A program of Core ML as a function from images to logits, by numpy.

    It computes what the graph and the weights in the files say, operation by operation in the order of the graph,
    which makes it a check of an export on systems without Core ML. It is slow. Numbers are in float32, and results
    that the graph has in float16 are rounded to it after each operation, where Core ML may also round sums on the way.

    Args:
        spec: a model of coremltools' ``Model.proto``, read from ``model.mlmodel``.
        weights: file of weights; None for a program without one.

    Raises:
        NotImplementedError: an operation is not known; the message names it.
        ValueError: the model is not an ML program with one input and one output, or a weight is not in the file.
    """

    def __init__(self, spec: Any, weights: Path | None) -> None:
        function = only(spec.mlProgram.functions.values(), "function")
        block = function.block_specializations[function.opset]
        source = only(function.inputs, "input")
        self._source, self._result = source.name, only(block.outputs, "output")
        self.input_shape = _shape(source.type.tensorType)
        self._weights = None if weights is None else np.memmap(weights, np.uint8, "r")
        self._constants: dict[str, Any] = {}
        self._calls = self._read(block.operations)

    def _read(self, operations: Sequence[Any]) -> tuple[Call, ...]:
        """Read all operations, and evaluate those that are constant."""
        calls: list[Call] = []
        later = {self._result}  # values that a later operation reads
        for operation in reversed(operations):
            kind = operation.type
            if kind in CONSTANT:
                continue
            if kind not in OPERATIONS:
                raise NotImplementedError(
                    f"operation '{kind[:99]}' is not among those that restnet_hf evaluates: {sorted(OPERATIONS)}"
                )
            inputs = {key: self._names(argument) for key, argument in operation.inputs.items()}
            read = {name for names in inputs.values() for name in names}
            outputs = tuple((each.name, *_declared(each.type)) for each in operation.outputs)
            calls.append(Call(kind, inputs, outputs, tuple(sorted(read - later))))
            later |= read
        for operation in operations:
            if operation.type in CONSTANT:
                values = {key: self._value(value) for key, value in operation.attributes.items() if key != "name"}
                values |= {key: self._constants[self._names(each)[0]] for key, each in operation.inputs.items()}
                (output,) = operation.outputs
                self._constants[output.name] = CONSTANT[operation.type](**values)
        return tuple(reversed(calls))

    def _names(self, argument: Any) -> tuple[str, ...]:
        """Names of the values of an argument; a literal is a constant from now on."""
        names = []
        for each in argument.arguments:
            if each.WhichOneof("binding") == "value":
                name = f"literal {len(self._constants)}"
                self._constants[name] = self._value(each.value)
            else:
                name = each.name
            names.append(name)
        return tuple(names)

    def _value(self, value: Any) -> Any:
        """A constant: text or an array, whose floating-point numbers are in float32."""
        tensor, kind = value.type.tensorType, value.WhichOneof("value")
        shape = _shape(tensor)
        if kind == "blobFileValue":
            array = self._blob(value.blobFileValue, tensor)
        elif kind == "immediateValue" and value.immediateValue.WhichOneof("value") == "tensor":
            field = value.immediateValue.tensor.WhichOneof("value")
            content = getattr(value.immediateValue.tensor, field).values
            if tensor.dataType == STRING:
                return str(content[0])
            dtype = _dtype(tensor)
            array = np.frombuffer(content, dtype) if field == "bytes" else np.array(content, dtype)
        else:
            raise NotImplementedError(f"a constant of kind {kind!r} is not evaluated")
        return _plain(array.reshape(shape))

    def _blob(self, place: Any, tensor: Any) -> np.ndarray:
        """A tensor of the file of weights."""
        dtype, shape = _dtype(tensor), _shape(tensor)
        size, whole = math.prod(shape) * np.dtype(dtype).itemsize, 0 if self._weights is None else len(self._weights)
        if self._weights is None or place.fileName != WEIGHTS or place.offset + BLOB.itemsize > whole:
            raise ValueError(f"a weight at {place.offset} of {place.fileName[:99]!r} is not in the file of weights")
        head = self._weights[place.offset : place.offset + BLOB.itemsize].view(BLOB)[0]
        start, end = int(head["offset"]), int(head["offset"]) + size
        if head["sentinel"] != SENTINEL or head["size"] != size or not 0 <= start <= end <= whole:
            raise ValueError(f"the weight at {place.offset} is not of {size} bytes")
        return self._weights[start:end].view(dtype)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of images (N, 3, H, W) in float32; N is fixed in the program."""
        if images.shape != self.input_shape:
            raise ValueError(f"the program takes images of shape {self.input_shape}, not {images.shape}")
        values: dict[str, Any] = {self._source: images.astype(np.float32)}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # as float16 does; the result shows it
            for call in self._calls:
                self._run(call, values)
        return values[self._result]

    def _run(self, call: Call, values: dict[str, Any]) -> None:
        """Evaluate one operation, add its results to the values, and drop values that are not read again."""
        parameters: dict[str, Any] = {}
        for key, names in call.inputs.items():
            read = [values[name] if name in values else self._constants[name] for name in names]
            parameters[key] = read if key == SEVERAL else read[0]
        results = OPERATIONS[call.kind](**parameters)
        for name in call.last:
            values.pop(name, None)
        listed = results if isinstance(results, list) else [results]
        for (name, dtype, shape), result in zip(call.outputs, listed, strict=True):
            if result.shape != shape:
                raise ValueError(f"'{call.kind}' gives shape {result.shape} where the program has {shape}")
            values[name] = _plain(result.astype(dtype, copy=False))


def weight_files(operations: Iterable[Any]) -> Iterator[str]:
    """Names of the files that constants of operations are in, as Core ML would open them.

    Args:
        operations: operations of a block of a program.
    """
    for operation in operations:
        bound = (each for argument in operation.inputs.values() for each in argument.arguments)
        literals = (each.value for each in bound if each.WhichOneof("binding") == "value")
        for value in (*operation.attributes.values(), *literals):
            if value.WhichOneof("value") == "blobFileValue":
                yield value.blobFileValue.fileName
        for block in operation.blocks:
            yield from weight_files(block.operations)


def only(items: Iterable[Any], what: str) -> Any:
    """The only one of some items.

    Raises:
        ValueError: there are none, or several.
    """
    listed = list(items)
    if len(listed) != 1:
        raise ValueError(f"the program has {len(listed)} {what}s where one is evaluated")
    return listed[0]


def _shape(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor type, all of whose sizes must be fixed."""
    if any(size.WhichOneof("dimension") != "constant" for size in tensor.dimensions):
        raise NotImplementedError("tensors of variable size are not evaluated")
    return tuple(size.constant.size for size in tensor.dimensions)


def _dtype(tensor: Any) -> Any:
    if tensor.dataType not in TYPES:
        raise NotImplementedError(f"tensors of data type {tensor.dataType} are not evaluated")
    return TYPES[tensor.dataType]


def _declared(kind: Any) -> tuple[Any, tuple[int, ...]]:
    """Numpy's type and the shape of a result."""
    return _dtype(kind.tensorType), _shape(kind.tensorType)


def _plain(array: np.ndarray) -> np.ndarray:
    """An array whose floating-point numbers are in float32."""
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array
