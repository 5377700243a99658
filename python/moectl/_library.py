"""libmoectl.so.0 by ctypes: its functions and structs, and nothing else. moectl.h says what they do."""

import ctypes
import os
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint8, c_void_p
from pathlib import Path
from typing import Optional

from ._errors import ArgumentError, ConfigError, MoectlError, ReductionError, StateError

_NAME = "libmoectl.so.0"
_ERRORS = {1: ArgumentError, 2: ConfigError, 3: StateError, 4: ReductionError}

ALL_LAYERS = -1
FROZEN, DECIDED, EVER_MOVES = 1, 2, 4
Sum = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(c_int64), c_size_t)
Log = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)


class Batch(ctypes.Structure):
    """moectl_batch. Pointers are addresses."""

    _fields_ = [
        ("size", c_size_t), ("tokens", c_size_t), ("experts", c_void_p), ("experts32", c_void_p), ("mask", c_void_p),
        ("sequence_length", c_int64), ("sequence_ids", c_void_p), ("top_values", c_void_p),
        ("biased_scores", c_void_p), ("probabilities", c_void_p), ("domain_ids", c_void_p),
        ("dropped", POINTER(c_int64)), ("balance_loss", POINTER(c_double)), ("z_loss", POINTER(c_double)),
    ]


class StepInfo(ctypes.Structure):
    """moectl_step_info."""

    _fields_ = [
        ("size", c_size_t), ("loss", POINTER(c_double)), ("gradient_norm", POINTER(c_double)), ("skipped", c_int),
        ("next_mixture", c_void_p),
    ]


class Figures(ctypes.Structure):
    """moectl_figures."""

    _fields_ = [
        ("size", c_size_t), ("step", c_int64), ("tokens", c_int64), ("max_vio", c_double), ("floor_max_vio", c_double),
        ("cv", c_double), ("floor_cv", c_double), ("drop_rate", c_double), ("dead_experts", c_double),
        ("limit_hits", c_int64), ("notices", c_int64),
    ]


_HANDLE = c_void_p
_FUNCTIONS = {
    "moectl_new": [c_char_p, c_char_p, POINTER(_HANDLE)],
    "moectl_new_from_file": [c_char_p, POINTER(_HANDLE)],
    "moectl_layers": [_HANDLE, POINTER(c_int), c_size_t, POINTER(c_size_t)],
    "moectl_shape": [_HANDLE, c_int, POINTER(c_size_t), POINTER(c_size_t)],
    "moectl_config": [_HANDLE, POINTER(c_void_p)],
    "moectl_record": [_HANDLE, c_int, POINTER(Batch), c_int64],
    "moectl_record_value": [_HANDLE, c_int, c_char_p, c_double],
    "moectl_record_counts": [_HANDLE, c_int, c_void_p, c_size_t, c_void_p],
    "moectl_check_choices": [_HANDLE, c_int, c_size_t, c_void_p, c_void_p, c_void_p],
    "moectl_say": [_HANDLE, c_char_p, c_int, c_char_p],
    "moectl_step": [_HANDLE, POINTER(StepInfo)],
    "moectl_steps": [_HANDLE, POINTER(c_int64)],
    "moectl_figures_of": [_HANDLE, POINTER(Figures)],
    "moectl_report_json": [_HANDLE, c_int, POINTER(c_void_p)],
    "moectl_biases": [_HANDLE, c_int, c_void_p, c_size_t],
    "moectl_deployment_biases": [_HANDLE, c_int, c_void_p, c_size_t],
    "moectl_aux_loss_weight": [_HANDLE, c_int, POINTER(c_double)],
    "moectl_temperature": [_HANDLE, c_int, POINTER(c_double)],
    "moectl_begin_at": [_HANDLE, c_int64],
    "moectl_hold": [_HANDLE, c_int],
    "moectl_freeze": [_HANDLE, c_int, c_int],
    "moectl_plans": [_HANDLE, c_void_p, c_size_t],
    "moectl_set_reduction": [_HANDLE, Sum, c_void_p],
    "moectl_set_log": [_HANDLE, Log, c_void_p],
    "moectl_log_to_file": [_HANDLE, c_char_p, c_int],
    "moectl_adopt": [_HANDLE, c_int, c_void_p, c_size_t],
    "moectl_adopt_aux_loss_weight": [_HANDLE, c_int, c_double],
    "moectl_adopt_temperature": [_HANDLE, c_int, c_double],
    "moectl_save": [_HANDLE, POINTER(c_void_p), POINTER(c_size_t)],
    "moectl_load": [_HANDLE, c_char_p, c_size_t, c_int, POINTER(c_void_p)],
    "moectl_save_layer": [_HANDLE, c_int, POINTER(c_void_p), POINTER(c_size_t)],
    "moectl_load_layer": [_HANDLE, c_int, c_char_p, c_size_t, c_int, POINTER(c_void_p)],
}


def _open() -> ctypes.CDLL:
    # The one that was named, the one installed with this package, the system's.
    named = os.environ.get("MOECTL_LIBRARY")
    beside = Path(__file__).parent / _NAME
    try:
        library = ctypes.CDLL(named or (str(beside) if beside.exists() else _NAME))
    except OSError as error:
        raise ImportError(f"moectl: {_NAME} cannot be loaded ({error}): install it, or name it in MOECTL_LIBRARY") from None
    for name, arguments in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = c_int
    library.moectl_version.restype = c_char_p
    library.moectl_error.restype = c_char_p
    library.moectl_set_error.argtypes = [c_char_p]
    library.moectl_set_error.restype = None
    library.moectl_free.argtypes = [_HANDLE]
    library.moectl_free.restype = None
    library.moectl_free_text.argtypes = [c_void_p]
    library.moectl_free_text.restype = None
    return library


lib = _open()


def version() -> str:
    return lib.moectl_version().decode()


def check(code: int) -> None:
    """Raises what a call said, in this thread, that returned `code`."""
    if code:
        raise _ERRORS.get(code, MoectlError)(lib.moectl_error().decode("utf-8", "replace"))


def taken(text: c_void_p, size: Optional[int] = None) -> bytes:
    """What a call returned as char**, copied and freed."""
    try:
        return ctypes.string_at(text, -1 if size is None else size)
    finally:
        lib.moectl_free_text(text)
