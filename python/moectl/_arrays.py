"""Arguments as C takes them: numbers in range, words, paths, and arrays as addresses. Arrays are those of NumPy, PyTorch
tensors on the CPU, whatever has a buffer, and lists of numbers. What cannot be an argument is an ArgumentError, which says
which argument, its value, and what it must be."""

import array
import ctypes
import functools
import operator
import os
import sys
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from ._errors import ArgumentError

_CODES = {"int64": "q", "int32": "i", "int16": "h", "int8": "b", "uint64": "Q", "uint32": "I", "uint16": "H", "uint8": "B",
          "float32": "f", "float64": "d"}
_SIZES = {name: array.array(code).itemsize for name, code in _CODES.items()}
_NAMES: Dict[Any, str] = {}  # of NumPy's types: asking a type for its name takes longer than a record's whole call
_KINDS = {**dict.fromkeys("bhilqn", "int"), **dict.fromkeys("BHILQN", "uint"), **dict.fromkeys("efd", "float")}


class Array(NamedTuple):
    address: int
    size: int
    type: str
    shape: Tuple[int, ...]
    keep: Any  # what owns the memory


def shown(value: Any) -> str:
    """A value in a message: short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def whole(name: str, value: Any, least: int = -2**63, most: int = 2**63 - 1) -> int:
    """A whole number from `least` to `most`: ctypes would cut off what is above."""
    if type(value) is int and least <= value <= most:
        return value
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"{name}: {shown(value)}: must be a whole number") from None
    if not least <= number <= most:
        raise ArgumentError(f"{name}: {number}: must be from {least} to {most}")
    return number


def real(name: str, value: Any) -> float:
    """A number, which may be NaN. A tensor or an array of one is a number."""
    try:
        if not isinstance(value, (str, bytes, bytearray)):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise ArgumentError(f"{name}: {shown(value)}: must be a number")


def switch(name: str, value: Any) -> int:
    """1 or 0, of what is true or false."""
    try:
        return 1 if value else 0
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"{name}: {shown(value)}: must be true or false") from None


def word(name: str, value: Any) -> bytes:
    """Text for C, which ends at a zero byte."""
    if not isinstance(value, str) or "\0" in value:
        raise ArgumentError(f"{name}: {shown(value)}: must be text without a zero byte")
    return value.encode("utf-8", "surrogatepass")


def path(name: str, value: Any) -> bytes:
    """The path of a file."""
    try:
        given = os.fsencode(value)
    except (TypeError, ValueError):
        given = b"\0"
    if b"\0" in given:
        raise ArgumentError(f"{name}: {shown(value)}: must be the path of a file")
    return given


def raw(name: str, value: Any) -> bytes:
    """Bytes, of whatever has a buffer."""
    try:
        return memoryview(value).tobytes()
    except (TypeError, BufferError):
        raise ArgumentError(f"{name}: {shown(value)}: must be bytes") from None


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
        try:
            if hasattr(tensor, "full_tensor"):
                tensor = tensor.full_tensor()
            if given != to:
                import torch

                tensor = tensor.to(getattr(torch, to))
            tensor = tensor.cpu().contiguous()
            return Array(tensor.data_ptr(), tensor.numel(), to, tuple(tensor.shape), tensor)
        except (RuntimeError, NotImplementedError) as error:  # sparse, or on the device "meta"
            raise ArgumentError(f"{name}: a tensor on {values.device}, {values.layout}: must be a dense tensor that has "
                                "values") from error
    if hasattr(values, "__array_interface__"):  # of NumPy
        import numpy

        numbers = numpy.asarray(values)
        given = _NAMES.get(numbers.dtype) or _NAMES.setdefault(numbers.dtype, numbers.dtype.name)
        to = _fits(given, wanted)
        if not to:
            raise _wrong(name, given, wanted)
        # The name of a type does not tell the order of its bytes.
        kept = numbers.dtype.isnative and given in ("bool", to)
        shape = numbers.shape
        if not (kept and numbers.flags.c_contiguous):
            numbers = numpy.ascontiguousarray(numbers, None if kept else to)
        return Array(numbers.__array_interface__["data"][0], numbers.size, to, shape, numbers)
    shape_of_list: Optional[Tuple[int, ...]] = None
    if isinstance(values, (list, tuple)):
        shape_of_list = _shape(name, values)
        values = _packed(name, list(_flat(values)), wanted)
    try:
        memory = memoryview(values)
    except (TypeError, BufferError):
        raise ArgumentError(f"{name}: {shown(values)}: must be an array, a tensor or a list") from None
    given, swapped = _type_of(memory.format, memory.itemsize)
    to = _fits(given, wanted)
    if not to or given == "float16":
        raise _wrong(name, given, wanted)
    shape = memory.shape if shape_of_list is None else shape_of_list
    if swapped or given not in (to, "bool"):
        numbers = array.array(_CODES[given], memory.tobytes())
        if swapped:
            numbers.byteswap()
        values = numbers if given == to else array.array(_CODES[to], numbers)
    elif memory.readonly or not memory.c_contiguous:
        values = bytearray(memory.tobytes())
    memory = memoryview(values)
    size = memory.nbytes // _SIZES[to]
    if size == 0:
        return Array(0, 0, to, shape, values)
    keep = ctypes.c_char.from_buffer(memory)  # holds all of it
    return Array(ctypes.addressof(keep), size, to, shape, keep)


@functools.lru_cache(maxsize=64)
def _type_of(format_: str, size: int) -> Tuple[str, bool]:
    """The type of a buffer's numbers, and whether their bytes stand in the other order than this machine's."""
    order, letter = (format_[0], format_[1:]) if format_[:1] in tuple("@=<>!") else ("@", format_)
    if letter == "?":
        return "bool", False
    kind = _KINDS.get(letter)
    if not kind:
        return format_, False
    other = (">", "!") if sys.byteorder == "little" else ("<",)
    return f"{kind}{8 * size}", order in other and size > 1


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if hasattr(value, "tolist"):  # of NumPy or PyTorch
            value = value.tolist()
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _shape(name: str, values: Any) -> Tuple[int, ...]:
    """[2, 3] of two rows of three."""
    if hasattr(values, "shape"):
        return tuple(values.shape)
    if not isinstance(values, (list, tuple)):
        return ()
    inner: List[Tuple[int, ...]] = [_shape(name, value) for value in values]
    for index, one in enumerate(inner):
        if one != inner[0]:
            raise ArgumentError(f"{name}[{index}]: {shown(values[index])}: must be as long as the others")
    return (len(values), *(inner[0] if inner else ()))


def _packed(name: str, values: List[Any], wanted: Tuple[str, ...]) -> "array.array[Any]":
    code = _CODES[wanted[0]]
    try:
        if code in "fd" or not any(isinstance(value, float) for value in values):
            return array.array(code, values)
    except (TypeError, OverflowError, ValueError):
        pass
    for index, value in enumerate(values):
        try:
            good = code in "fd" or not isinstance(value, float)
            array.array(code, [value])
        except (TypeError, OverflowError, ValueError):
            good = False
        if not good:
            raise ArgumentError(f"{name}: {shown(value)} (number {index}): must be {' or '.join(wanted)}")
    raise _wrong(name, "a list", wanted)


def shaped(name: str, given: Array, words: str, *allowed: Tuple[int, ...]) -> Array:
    """The array, if it has one of the allowed shapes, which `words` tells."""
    if given.shape not in allowed:
        raise ArgumentError(f"{name}: {list(given.shape)}: must be {words}")
    return given
