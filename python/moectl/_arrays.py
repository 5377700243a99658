"""Arrays as addresses: NumPy arrays, PyTorch tensors on the CPU, whatever has a buffer, and lists of numbers."""

import array
import ctypes
from typing import Any, Iterator, NamedTuple, Sequence, Tuple

from ._errors import ArgumentError

_CODES = {"int64": "q", "int32": "i", "uint8": "B", "float32": "f", "float64": "d"}
_FORMATS = {"q": "int64", "l": "int64", "i": "int32", "B": "uint8", "?": "uint8", "f": "float32", "d": "float64"}


class Array(NamedTuple):
    address: int
    size: int
    type: str
    keep: Any  # what owns the memory


def _fits(given: str, wanted: Tuple[str, ...]) -> str:
    """The one of the wanted types in which a value of the given type loses nothing; "" if there is none."""
    if given in wanted:
        return given
    if given == "bool":
        return "uint8" if "uint8" in wanted else ""
    kind = "float" if given.startswith(("float", "bfloat")) else "int" if given.startswith(("int", "uint")) else ""
    for one in wanted:
        if kind and one.startswith(kind):
            return one
    return ""


def _wrong(name: str, given: str, wanted: Tuple[str, ...]) -> ArgumentError:
    return ArgumentError(f"{name}: {given}: must be {' or '.join(wanted)}")


def view(name: str, values: Any, *wanted: str) -> Array:
    """`values` in row-major order as one of the `wanted` types: read in place where they lie so, else converted."""
    if hasattr(values, "data_ptr"):  # a tensor
        tensor = values.detach()
        given = str(tensor.dtype).split(".")[-1]
        to = _fits(given, wanted)
        if not to:
            raise _wrong(name, given, wanted)
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        if given != to:
            import torch

            tensor = tensor.to(getattr(torch, to))
        tensor = tensor.cpu().contiguous()
        return Array(tensor.data_ptr(), tensor.numel(), to, tensor)
    if hasattr(values, "__array_interface__"):  # of NumPy
        import numpy

        numbers = numpy.asarray(values)
        to = _fits(numbers.dtype.name, wanted)
        if not to:
            raise _wrong(name, numbers.dtype.name, wanted)
        numbers = numpy.ascontiguousarray(numbers, None if numbers.dtype.name in ("bool", to) else to)
        return Array(numbers.ctypes.data, numbers.size, to, numbers)
    if isinstance(values, (list, tuple)):
        values = array.array(_CODES[wanted[0]], _flat(name, values, wanted))
    try:
        memory = memoryview(values)
    except TypeError:
        raise ArgumentError(f"{name}: {type(values).__name__}: must be an array, a tensor or a list") from None
    given = _FORMATS.get(memory.format, memory.format)
    if given not in wanted or not memory.c_contiguous:
        raise _wrong(name, given, wanted)
    if memory.readonly:
        memory = memoryview(bytearray(memory)).cast(memory.format if memory.format != "?" else "B")
    size = memory.nbytes // memory.itemsize
    if size == 0:
        return Array(0, 0, given, values)
    keep = (ctypes.c_char * memory.nbytes).from_buffer(memory.cast("B"))
    return Array(ctypes.addressof(keep), size, given, keep)


def _flat(name: str, values: Sequence[Any], wanted: Tuple[str, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(name, value, wanted)
        elif isinstance(value, float) and not wanted[0].startswith("float"):
            raise _wrong(name, "float", wanted)
        else:
            yield value
