"""Byte arrays out of a pickle without running what is in it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable

import numpy


class _Dtype:
    """Stands in for ``numpy.dtype``: remembers its code."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment: nothing to know about single bytes."""


class _Array:
    """Stands in for ``numpy.ndarray``: a shape and its bytes."""

    values: numpy.ndarray | None = None  # a damaged pickle may never say

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_column, content = state
        if (
            not isinstance(dtype, _Dtype)
            or dtype.code not in ("u1", b"u1")
            or not isinstance(content, bytes)
        ):
            raise pickle.UnpicklingError("it holds an array that is not of bytes")
        self.values = numpy.frombuffer(content, numpy.uint8).reshape(
            shape, order="F" if by_column else "C"
        )


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _encode(text: str, _: str) -> bytes:
    return text.encode("latin1")  # how old protocols spell bytes


# The names that a pickled array of bytes refers to; none of numpy's own code is reached.
_STAND_INS: dict[tuple[str, str], Callable] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _ByteUnpickler(pickle.Unpickler):
    """Refuses every name but those of an array of bytes."""

    def find_class(self, module: str, name: str) -> Callable:
        """The stand-in for ``module.name``."""
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which data have no use for; nothing was run"
            )
        return _STAND_INS[module, name]


def load_bytes(content: bytes) -> dict[str, object]:
    """The top-level dict of a pickle, with its byte arrays (uint8, any shape) as numpy arrays.

    Python 2's pickles are read too; keys are returned as str.

    Raises:
        pickle.UnpicklingError: If the pickle is damaged, or wants anything but plain values and
        byte arrays.
    """
    try:
        record = _ByteUnpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise pickle.UnpicklingError(
            f"it cannot be read: {error or type(error).__name__}"
        ) from error
    if not isinstance(record, dict):
        raise pickle.UnpicklingError(f"it holds a {type(record).__name__}, not a dict")
    return {
        _text(key): value.values if isinstance(value, _Array) else value
        for key, value in record.items()
    }


def _text(key: object) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)
