"""Runs a compiled model from Python: NumPy arrays in, NumPy arrays out, without a copy of the weights.

Stands alone: this file lies in every variant beside ``main.so``, and needs NumPy and nothing of ModelForge or TVM::

    from player import Model

    model = Model("path/of/the/variant")
    outputs = model.run({"x": array})  # by name; any number of samples where the batch is dynamic

It speaks to ``libtvm_ffi.so`` through its C interface (``tvm/ffi/c_api.h``), as ``runner.c`` does.
"""

from __future__ import annotations

import ctypes
import filecmp
import os
import struct
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

__all__ = ["Model", "Tensor"]

_Result = TypeVar("_Result")

HEADER: Final = "modelforge-tvm 2"
_LIBRARIES: Final = ("libtvm_ffi.so", "libtvm_runtime.so")
_ALIGNMENT: Final = 64
_NONE, _INT, _BOOL, _RAW_STR, _FUNCTION, _TENSOR = 0, 1, 2, 8, 68, 70
"""``TVMFFITypeIndex``."""
_OBJECT_BYTES: Final = 24
"""``sizeof(TVMFFIObject)``: what a tensor's DLTensor and an error's texts lie behind."""
_CODES: Final = {"i": 0, "u": 1, "f": 2, "b": 6}
"""``DLDataTypeCode`` by NumPy's ``dtype.kind``."""
_CPU: Final = 1
_POOLED: Final = 2
_DLPACK_VERSION: Final = (1, 3)


@dataclass(frozen=True)
class Tensor:
    """An input or output. ``shape`` has ``"*"`` first where that dimension is the batch."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def batched(self) -> bool:
        return self.shape[:1] == ("*",)


class Model:
    """A variant, loaded. Any thread may call it; all models of a process take turns, on one pool of threads.

    Attributes:
        inputs: what :meth:`run` takes.
        outputs: what it gives.
        batches: the batch sizes that have code of their own, rising; empty where the batch is fixed.
    """

    def __init__(self, variant: str | os.PathLike[str], threads: int | None = None) -> None:
        """Load a variant.

        Args:
            variant: the folder of ``main.so`` and its libraries, or the path of ``main.so``.
            threads: for all models of this process; None: ``TVM_NUM_THREADS``, else as many as the target's profile
                has cores, or as this process may use if that is fewer. TVM reads it once, when a model first runs.

        Raises:
            OSError: a file is missing, cut off, or made for another machine.
            RuntimeError: it is not a model, or of another version than this file or the runtime that is loaded.
        """
        path = Path(variant)
        path = path / "main.so" if path.is_dir() else path
        _check_whole(path)
        self._runtime = _runtime(path.parent)
        library = ctypes.CDLL(str(path.resolve()), mode=os.RTLD_LAZY | os.RTLD_LOCAL)
        text = bytes(_embedded(library, "signature_txt", path)).decode("utf-8")
        described = _read(text, path)
        if threads is not None:
            os.environ["TVM_NUM_THREADS"] = str(threads)
        _set_threads(described.threads)
        self.inputs, self.outputs = described.inputs, described.outputs
        self.batches = tuple(entry.batch for entry in described.entries) if _any_batched(self.inputs) else ()
        weights = _embedded(library, "weights_bin", path)
        if len(weights) != described.weight_bytes:
            raise RuntimeError(f"{path} holds {len(weights)} bytes of weights, its text says {described.weight_bytes}")
        self._library = library  # the weights lie in it
        machine = self._runtime.load(path.resolve())
        tensors = [self._runtime.tensor(_view(weights, weight, path)) for weight in described.weights]
        functions = [self._runtime.member(machine, entry.function) for entry in described.entries]
        self._entries = [
            _Loaded(entry.batch, function, [tensors[row] for row in entry.weights])
            for entry, function in zip(described.entries, functions, strict=True)
        ]
        # Not when Python ends: the kernel is quicker, and the runtime's threads may still be alive.
        weakref.finalize(self, _release, self._runtime, [*functions, *tensors, machine]).atexit = False

    def __call__(self, **inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
        """As :meth:`run`, for names that Python can spell."""
        return self.run(inputs)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Run the model.

        Args:
            inputs: one array per name, of the very dtype. A shape that begins with ``"*"`` takes any number of
                samples, the same for all such inputs: they are run in the largest batches that fit, the last filled up
                to the next larger one and cut off again.

        Returns:
            The outputs by name; they are copies, the caller's own.

        Raises:
            ValueError: an input is missing, unknown, or of another dtype or shape.
            RuntimeError: the model failed; the text is TVM's.
        """
        arrays = [_checked(tensor, inputs) for tensor in self.inputs]
        if unknown := set(inputs) - {tensor.name for tensor in self.inputs}:
            raise ValueError(f"no input is called {', '.join(sorted(unknown))}; there are {_names(self.inputs)}")
        counts = {len(array) for tensor, array in zip(self.inputs, arrays, strict=True) if tensor.batched}
        if len(counts) > 1:
            raise ValueError(f"the inputs differ in their number of samples: {', '.join(map(str, sorted(counts)))}")
        if 0 in counts:
            raise ValueError("the inputs hold no sample")
        if counts:
            return self._runtime.apart(self._in_batches, arrays, counts.pop())
        return self._named(self._runtime.apart(self._run, self._entries[0], arrays))

    def _in_batches(self, arrays: Sequence[np.ndarray[Any, Any]], samples: int) -> dict[str, np.ndarray[Any, Any]]:
        parts: list[list[np.ndarray[Any, Any]]] = []
        for begin in range(0, samples, self.batches[-1]):
            count = min(samples - begin, self.batches[-1])
            entry = next(each for each in self._entries if each.batch >= count)
            chunk = [
                _filled(array[begin : begin + count], entry.batch) if tensor.batched else array
                for tensor, array in zip(self.inputs, arrays, strict=True)
            ]
            results = self._run(entry, chunk)
            parts.append([a[:count] if t.batched else a for t, a in zip(self.outputs, results, strict=True)])
        if len(parts) == 1:
            return self._named(parts[0])
        columns = zip(self.outputs, zip(*parts, strict=True), strict=True)
        return {t.name: np.concatenate(column) if t.batched else column[0] for t, column in columns}

    def _named(self, arrays: Sequence[np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        return {tensor.name: array for tensor, array in zip(self.outputs, arrays, strict=True)}

    def _run(self, entry: _Loaded, arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        aligned = [_aligned(array) for array in arrays]  # alive until the call is over
        tensors = [self._runtime.tensor(array) for array in aligned]
        result = self._runtime.call(entry.function, [*tensors, *entry.weights])
        for tensor in tensors:
            self._runtime.drop(tensor)
        found = self._runtime.arrays(result, self.outputs)
        self._runtime.drop(result)
        return found


def _release(runtime: _Runtime, values: Sequence[_Any]) -> None:
    for value in values:
        runtime.drop(value)


# ---- what the library says of itself (signature.py describes the format) ----


@dataclass(frozen=True)
class _Weight:
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Entry:
    batch: int
    function: str
    weights: tuple[int, ...]


@dataclass(frozen=True)
class _Described:
    threads: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: tuple[_Weight, ...]
    weight_bytes: int
    entries: tuple[_Entry, ...]


@dataclass(frozen=True)
class _Loaded:
    batch: int
    function: _Any
    weights: list[_Any]


def _read(text: str, path: Path) -> _Described:
    lines = text.splitlines()
    if not lines or lines[0] != HEADER:
        raise RuntimeError(
            f"{path} describes itself as {lines[0] if lines else ''!r}, this player reads {HEADER!r}: "
            "they are of different versions, take both from one variant"
        )
    found: dict[str, list[str]] = {word: [] for word in ("threads", "input", "output", "weights", "weight", "entry")}
    try:
        for line in lines[1:]:
            word, _, rest = line.partition(" ")
            found[word].append(rest)
        return _Described(
            threads=int(found["threads"][0]),
            inputs=tuple(map(_tensor, found["input"])),
            outputs=tuple(map(_tensor, found["output"])),
            weights=tuple(map(_weight, found["weight"])),
            weight_bytes=int(found["weights"][0]),
            entries=tuple(map(_entry, found["entry"])),
        )
    except (KeyError, IndexError, ValueError) as error:
        raise RuntimeError(f"what {path} says of itself cannot be read: {error}") from error


def _tensor(line: str) -> Tensor:
    dtype, rank, rest = line.split(" ", 2)
    *sizes, name = rest.split(" ", int(rank))
    return Tensor(name, dtype, tuple("*" if size == "*" else int(size) for size in sizes))


def _weight(line: str) -> _Weight:
    offset, dtype, _, *sizes = line.split(" ")
    return _Weight(int(offset), dtype, tuple(map(int, sizes)))


def _entry(line: str) -> _Entry:
    batch, function, *rows = line.split(" ")
    return _Entry(int(batch), function, tuple(map(int, rows)))


def _check_whole(path: Path) -> None:
    """A file that was cut off is mapped without complaint, and ends in a bus error when the missing part is read: the
    table of sections is its last part (ELF64 header: e_shoff at 40, e_shentsize and e_shnum at 58)."""
    with path.open("rb") as stream:
        header = stream.read(64)
        size = stream.seek(0, os.SEEK_END)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        raise OSError(f"{path} is not a model library")
    (begin,), (width, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    if size < begin + width * count:
        raise OSError(f"{path} is cut off: {size} bytes of {begin + width * count}")


def _embedded(library: ctypes.CDLL, name: str, path: Path) -> memoryview:
    """The bytes that the library carries under a name, where they are mapped."""
    try:
        begin, end = (
            ctypes.addressof(ctypes.c_char.in_dll(library, f"_binary_{name}_{part}")) for part in ("start", "end")
        )
    except ValueError:
        raise RuntimeError(f"{path} does not describe itself: ModelForge did not make it") from None
    return memoryview((ctypes.c_char * (end - begin)).from_address(begin)).cast("B")


def _view(weights: memoryview, weight: _Weight, path: Path) -> np.ndarray[Any, Any]:
    try:
        return np.ndarray(weight.shape, weight.dtype, weights, weight.offset)
    except TypeError as error:  # it does not fit into the bytes that there are
        raise RuntimeError(f"what {path} says of its weights is wrong: {error}") from error


def _set_threads(profile: int) -> None:
    """TVM would run on cores that this process was kept from: its pinning knows nothing of the process's own."""
    usable = len(os.sched_getaffinity(0))
    os.environ.setdefault("TVM_NUM_THREADS", str(min(profile, usable)))
    if usable < (os.cpu_count() or usable):
        os.environ.setdefault("TVM_BIND_THREADS", "0")


# ---- arrays ----


def _any_batched(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.batched for tensor in tensors)


def _names(tensors: Sequence[Tensor]) -> str:
    return ", ".join(tensor.name for tensor in tensors)


def _checked(tensor: Tensor, inputs: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    if tensor.name not in inputs:
        raise ValueError(f"input {tensor.name} is missing")
    array = np.asarray(inputs[tensor.name])
    if array.dtype != np.dtype(tensor.dtype):
        raise ValueError(f"input {tensor.name} is {array.dtype}, the model takes {tensor.dtype}")
    wanted = tensor.shape
    if array.ndim != len(wanted) or any(w not in ("*", size) for w, size in zip(wanted, array.shape, strict=True)):
        raise ValueError(f"input {tensor.name} has the shape {array.shape}, the model takes {_shown(wanted)}")
    return array


def _shown(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"


def _filled(array: np.ndarray[Any, Any], batch: int) -> np.ndarray[Any, Any]:
    """Up to ``batch`` samples by repeating the last."""
    if len(array) == batch:
        return array
    return np.concatenate([array, np.repeat(array[-1:], batch - len(array), axis=0)])


def _aligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array itself where the code can read it as it lies, else a copy."""
    if array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT
    copy: np.ndarray[Any, Any] = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


# ---- TVM's C interface ----


class _Any(ctypes.Structure):
    """``TVMFFIAny``; the value is a number or an address."""

    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int64))


class _Bytes(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """``DLManagedTensorVersioned``. Without a deleter: who made it keeps what it points to."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


class _Runtime:
    """TVM's runtime. Values are :class:`_Any`; those that are objects are dropped by who got them."""

    def __init__(self, libraries: Sequence[Path]) -> None:
        # Global: model libraries take its symbols, and those of libm, from the process.
        loaded = [ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_GLOBAL) for path in libraries]
        self.libraries = tuple(libraries)
        self._ffi = loaded[0]
        self._kept: dict[int, Any] = {}
        self._thread = ThreadPoolExecutor(1, "modelforge-player")
        self._process = os.getpid()

    def apart(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call a function in the one thread that runs models: TVM gives each thread that calls it a pool of threads,
        and never takes it back."""
        if self._process != os.getpid():  # forked: the thread is the parent's
            self._thread, self._process = ThreadPoolExecutor(1, "modelforge-player"), os.getpid()
        return self._thread.submit(function, *arguments).result()

    def load(self, path: Path) -> _Any:
        """The virtual machine of a model library, ready."""
        library = self.call(self._global("ffi.ModuleLoadFromFile"), [str(path)])
        machine = self.call(self.member(library, "vm_load_executable"), [])
        self.call(self.member(machine, "vm_initialization"), [_CPU, 0, _POOLED])
        self.drop(library)  # the machine holds it
        return machine

    def member(self, module: _Any, name: str) -> _Any:
        found = self.call(self._global("ffi.ModuleGetFunction"), [module, name, False])
        if found.type_index != _FUNCTION:
            raise RuntimeError(f"the model library has no function {name}")
        return found

    def call(self, function: _Any, arguments: Sequence[_Any | str | int]) -> _Any:
        result = _Any(_NONE, 0, 0)
        texts = {text: ctypes.create_string_buffer(text.encode()) for text in arguments if isinstance(text, str)}
        given = (_Any * len(arguments))(*(_packed(argument, texts) for argument in arguments))
        handle = ctypes.c_void_p(function.value)
        if self._ffi.TVMFFIFunctionCall(handle, given, ctypes.c_int32(len(arguments)), ctypes.byref(result)) != 0:
            self._raise()
        return result

    def tensor(self, array: np.ndarray[Any, Any]) -> _Any:
        """A tensor over the memory of an array: aligned, contiguous, and kept by the caller while the tensor lives."""
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        flat = _DLTensor(
            data=array.ctypes.data,
            device_type=_CPU,
            ndim=array.ndim,
            code=_CODES[array.dtype.kind],
            bits=array.dtype.itemsize * 8,
            lanes=1,
            shape=shape,
        )
        view = _Managed(major=_DLPACK_VERSION[0], minor=_DLPACK_VERSION[1], tensor=flat)
        handle = ctypes.c_void_p()
        make = self._ffi.TVMFFITensorFromDLPackVersioned
        if make(ctypes.byref(view), ctypes.c_int32(_ALIGNMENT), ctypes.c_int32(1), ctypes.byref(handle)) != 0:
            self._raise()
        made = _Any(_TENSOR, 0, handle.value or 0)
        self._kept[made.value] = (view, shape)
        return made

    def drop(self, value: _Any) -> None:
        """Give an object back."""
        self._ffi.TVMFFIObjectDecRef(ctypes.c_void_p(value.value))
        self._kept.pop(value.value, None)

    def arrays(self, result: _Any, expected: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
        """Copies of what a model gave: one tensor, or an array of several."""
        if result.type_index == _TENSOR:
            return [_copied(result, expected[0])]
        item = self._global("ffi.ArrayGetItem")
        found = []
        for position, tensor in enumerate(expected):
            value = self.call(item, [result, position])
            found.append(_copied(value, tensor))
            self.drop(value)
        self.drop(item)
        return found

    def _global(self, name: str) -> _Any:
        key, handle = name.encode(), ctypes.c_void_p()
        text = _Bytes(ctypes.cast(ctypes.c_char_p(key), ctypes.c_void_p), len(key))
        found = self._ffi.TVMFFIFunctionGetGlobal(ctypes.byref(text), ctypes.byref(handle)) == 0
        if not found or handle.value is None:
            raise RuntimeError(f"the TVM runtime has no function {name}")
        return _Any(_FUNCTION, 0, handle.value)

    def _raise(self) -> None:
        handle = ctypes.c_void_p()
        self._ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(handle))
        if handle.value is None:
            raise RuntimeError("TVM failed and gave no reason")
        kind, message = (_Bytes * 2).from_address(handle.value + _OBJECT_BYTES)
        words = [ctypes.string_at(text.data, text.size).decode("utf-8", "replace") for text in (kind, message)]
        self._ffi.TVMFFIObjectDecRef(handle)
        raise RuntimeError(": ".join(words))


def _packed(argument: _Any | str | int, texts: Mapping[str, Any]) -> _Any:
    if isinstance(argument, _Any):
        return argument
    if isinstance(argument, str):
        return _Any(_RAW_STR, 0, ctypes.addressof(texts[argument]))
    return _Any(_BOOL if isinstance(argument, bool) else _INT, 0, argument)


def _copied(value: _Any, expected: Tensor) -> np.ndarray[Any, Any]:
    tensor = _DLTensor.from_address(value.value + _OBJECT_BYTES)
    shape, dtype = tuple(tensor.shape[: tensor.ndim]), np.dtype(expected.dtype)
    fits = len(shape) == len(expected.shape) and all(w in ("*", s) for w, s in zip(expected.shape, shape, strict=True))
    if (
        value.type_index != _TENSOR
        or not fits
        or (tensor.code, tensor.bits) != (_CODES[dtype.kind], dtype.itemsize * 8)
    ):
        raise RuntimeError(f"output {expected.name} is not what the model library says of it")
    array = np.empty(shape, dtype)
    ctypes.memmove(array.ctypes.data, (tensor.data or 0) + tensor.byte_offset, array.nbytes)
    return array


_started: _Runtime | None = None
_starting = threading.Lock()


def _runtime(folder: Path) -> _Runtime:
    """The runtime of this process: a second one beside it would register everything twice."""
    global _started  # noqa: PLW0603 - one per process is what it is
    with _starting:
        if _started is None:
            _started = _Runtime([_same_or_own(folder / name) for name in _LIBRARIES])
        else:
            for name in _LIBRARIES:
                _same_or_own(folder / name)
        return _started


def _same_or_own(path: Path) -> Path:
    """The library that this process has loaded under this name already, if it is the same one; else the variant's."""
    if not path.is_file():
        raise OSError(f"{path} is missing: it belongs to the variant")
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        loaded = Path(line.partition("/")[1] + line.partition("/")[2])
        if loaded.name != path.name:
            continue
        if not loaded.samefile(path) and not filecmp.cmp(loaded, path, shallow=False):
            raise RuntimeError(f"{loaded} is loaded and differs from {path}: run this model in a process of its own")
        return loaded
    return path.resolve()
