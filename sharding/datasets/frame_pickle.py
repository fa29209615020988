"""The columns of a pandas DataFrame in a pickle, read without pandas and without running anything of the file.

A pickle names functions to call. Here every known name is an inert class that only keeps what it is called with, any
other name is refused, and the tree of these is then read as data: pandas 1.5 to 3.1, pickle protocols 2 to 5.
"""

import os
import pickle
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sharding.errors import AnnotationError

_MOST_BYTES = 1 << 30
_ADVICE = "export it with pandas: frame.to_json(path, orient='records', lines=True)"
_NAMES = frozenset(
    {
        ("_codecs", "encode"),
        ("builtins", "slice"),
        ("__builtin__", "slice"),
        ("functools", "partial"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        *(("pandas", name) for name in ("DataFrame", "Index", "RangeIndex", "StringDtype")),
        ("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked"),
        ("pandas._libs.internals", "_unpickle_block"),
        ("pandas.arrays", "StringArray"),
        ("pandas.core.frame", "DataFrame"),
        ("pandas.core.indexes.base", "Index"),
        ("pandas.core.indexes.base", "_new_Index"),
        ("pandas.core.indexes.range", "RangeIndex"),
        ("pandas.core.internals.blocks", "new_block"),
        ("pandas.core.internals.managers", "BlockManager"),
    }
)
_DAMAGE = (
    *(pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError, MemoryError),
    *(OverflowError, RecursionError, TypeError, ValueError, AssertionError, struct.error),
)
"""What a damaged pickle, or another one, raises."""
_MOST_PARTS = 100
_DTYPE = re.compile(r"[fiu][1248]|b1|O8?")


def read_frame(path: Path) -> dict[str, list[Any]]:
    """Return the columns of the DataFrame pickled in `path`, by name, in the frame's order.

    Raises:
        AnnotationError: not readable, no such pickle, or one that names anything but a frame's parts.
    """
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) <= _MOST_BYTES:
                return _columns(_Reader(file).load())
    except OSError as error:
        raise AnnotationError(f"{path}: expected a readable file, found: {error.strerror}") from error
    except _ForeignName as error:
        raise AnnotationError(f"{path}: expected the parts of a DataFrame, found the name {error}; {_ADVICE}") from None
    except _DAMAGE as error:
        raise AnnotationError(
            f"{path}: expected a pickled DataFrame, found other contents ({error}); {_ADVICE}"
        ) from None
    raise AnnotationError(f"{path}: expected at most {_MOST_BYTES} bytes, found {size}; {_ADVICE}")


class _ForeignName(Exception):  # noqa: N818  # a name, not an error of its own
    pass


class _Made:
    """What a call, or a class with its state, would have made."""

    name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **_named: Any) -> "_Made":
        made = super().__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any) -> "_Made":
        return _Called(self, args)


class _Called(_Made):
    """The call of a partial function."""


class _Reader(pickle._Unpickler):  # the one in C fills memory for a single wrong memo number
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _NAMES:
            raise _ForeignName(f"{module_name}.{global_name}")
        return type("_Inert", (_Made,), {"name": global_name})

    def persistent_load(self, pid: Any) -> Any:
        raise _ForeignName(f"of a persistent {type(pid).__name__}")


def _columns(frame: Any) -> dict[str, list[Any]]:
    manager = _named(frame, "DataFrame").state["_mgr"]
    blocks, axes = _named(manager, "BlockManager").args
    names = _array(_named(axes[0], "_new_Index").args[1]["data"]).tolist()
    columns: dict[int, list[Any]] = {}
    for block in blocks:
        values, placement = (block.args[1] if isinstance(block, _Called) else block.args)[:2]
        array = _array(values)
        rows = array if array.ndim == 2 else array.reshape(1, -1)
        places = _places(placement)
        if len(places) != len(rows):
            raise ValueError(f"a block of {len(rows)} columns for {len(places)} places")
        columns |= dict(zip(places, rows.tolist(), strict=True))
    if sorted(columns) != list(range(len(names))) or len({len(column) for column in columns.values()}) > 1:
        raise ValueError("columns are missing or of unequal lengths")
    return {str(name): columns[place] for place, name in enumerate(names)}


def _named(made: Any, *names: str) -> _Made:
    if not isinstance(made, _Made) or made.name not in names:
        raise ValueError(f"expected {' or '.join(names)}, found {getattr(made, 'name', type(made).__name__)}")
    return made


def _places(placement: Any) -> Sequence[int]:
    if isinstance(placement, _Made) and placement.name == "slice":
        start, stop, step = placement.args
        return range(start or 0, stop, step or 1)
    return [int(place) for place in _array(placement).tolist()]


def _array(made: Any) -> "np.ndarray[Any, Any]":
    made = _named(made, "_reconstruct", "_frombuffer", "__pyx_unpickle_NDArrayBacked")
    if made.name == "_frombuffer":
        buffer, dtype, shape, order = made.args
        return _filled(buffer, _dtype(dtype), tuple(shape), order)
    if made.name == "_reconstruct":
        _, shape, dtype, is_fortran, data = made.state
        return _filled(data, _dtype(dtype), tuple(shape), "F" if is_fortran else "C")
    waiting = [made.state]
    for part in waiting:  # which grows: the values lie somewhere in tuples of tuples
        if isinstance(part, _Made) and part.name in ("_reconstruct", "_frombuffer"):
            return _array(part)
        if isinstance(part, tuple) and len(waiting) < _MOST_PARTS:
            waiting += part
    raise ValueError("an array without values")


def _filled(data: Any, dtype: "np.dtype[Any]", shape: tuple[int, ...], order: Any) -> "np.ndarray[Any, Any]":
    if dtype.hasobject:
        array = np.empty(len(data), dtype=object)
        array[:] = data if isinstance(data, list) else None
    else:
        array = np.frombuffer(_bytes(data), dtype=dtype)
    return array.reshape(shape, order="F" if order == "F" else "C")


def _bytes(data: Any) -> bytes:
    if isinstance(data, _Made) and data.name == "encode":
        text, coding = data.args
        if coding != "latin1":
            raise ValueError("bytes in another coding than latin1")
        return str(text).encode("latin1")
    return data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))


def _dtype(made: Any) -> "np.dtype[Any]":
    made = _named(made, "dtype")
    (name, *_), order = made.args, made.state[1]
    if not _DTYPE.fullmatch(name) or order not in ("<", ">", "|", "="):
        raise ValueError(f"values of type {name}")
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype.newbyteorder(order)
