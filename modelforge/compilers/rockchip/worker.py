"""Speaks for RKNN-Toolkit2 in its own environment: one file, the standard library and the vendor's modules.

``python -s -P worker.py REQUEST.json ANSWER.json``. A request says what to build, and what then: ``export`` the .rknn
file, or ``simulate``: hold it against the one that ships, and run it in the toolkit's PC simulator.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import itertools
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

Request = dict[str, Any]

_RAISED = re.compile(r"^[A-Za-z_.]*(Error|Exception|Warning|InvalidGraph|Fail): ?")
_REFUSES = re.compile(r"[Uu]n ?support|not (yet )?support|need to be constant|INVALID_GRAPH|NOT_IMPLEMENTED")

_INSIDE = "MODELFORGE_RKNN_WORKER"
_BUILD, _THEN, _FILE = "build.json", "then.json", "main.rknn"
_PATH_LENGTH = 240
_ADDRESSES = (1 << 40, 1 << 47)
_UNEXPLAINED = 64
"""How many bytes may differ beside whole addresses: halves of them, in padding that the toolkit does not clear."""


def main(request_file: str, answer_file: str) -> None:
    if _INSIDE not in os.environ:
        _begin_anew(request_file, answer_file)
    tempfile._name_sequence = (f"{number:08d}" for number in itertools.count())  # type: ignore[attr-defined]  # private
    sys.meta_path.insert(0, _NoTorch())
    try:
        answer: dict[str, Any] = {"result": work()}
    except _Told as error:
        answer = {"error": error.answer}
    except Exception as error:  # the toolkit raises anything, and what it raises holds its own traceback as text
        what = _sentence(str(error)) or type(error).__name__
        kind = "UnsupportedError" if _REFUSES.search(what) else "BuildError"
        answer = {"error": {"type": kind, "what": what}}
    with open(answer_file + ".part", "w", encoding="utf-8") as stream:
        json.dump(answer, stream)
    os.replace(answer_file + ".part", answer_file)
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)  # what the toolkit's C++ printed: its table of layers is in it
    # No interpreter shutdown: what the toolkit's libraries do in it decides nothing any more.
    os._exit(0)


def work() -> dict[str, Any]:
    """Build and export; only then look at what is to be done with it, so that every build goes the same way."""
    toolkit = _built(_read(_BUILD))
    if toolkit.export_rknn(_FILE) != 0 or not os.path.isfile(_FILE):
        raise _Told("BuildError", "the toolkit wrote no .rknn file")
    then = _read(_THEN)
    if then["action"] == "simulate":
        return simulate(toolkit, then)
    os.replace(_FILE, then["artifact"])
    return {}


def simulate(toolkit: Any, request: Request) -> dict[str, Any]:
    """Write the outputs of the samples: one array a model output, samples along the first axis."""
    import numpy as np

    differs = _compare(request["artifact"], _FILE)
    if toolkit.init_runtime() != 0:
        raise _Told("BuildError", "the toolkit's simulator does not start")
    with np.load(request["samples"], allow_pickle=False) as archive:
        arrays = [archive[entry["name"]] for entry in request["inputs"]]
    outputs: list[list[Any]] = [[] for _ in request["outputs"]]
    off_grid = 0.0
    for start in range(0, len(arrays[0]), request["batch"]):
        rows = [array[start : start + request["batch"]] for array in arrays]
        fed = [_fed(entry, each, request["batch"]) for entry, each in zip(request["inputs"], rows, strict=True)]
        off_grid = max(off_grid, *(distance for _, distance in fed))
        formats = ["nhwc" if entry["pixels"] else "nchw" for entry in request["inputs"]]
        given = toolkit.inference(inputs=[array for array, _ in fed], data_format=formats)
        if given is None or len(given) != len(outputs):
            raise _Told("BuildError", "the toolkit's simulator gave no outputs")
        for place, entry in enumerate(request["outputs"]):
            outputs[place].append(given[place][: len(rows[0])] if entry["batched"] else given[place][None])
    found: dict[str, Any] = {
        entry["name"]: np.concatenate(each) for entry, each in zip(request["outputs"], outputs, strict=True)
    }
    with open(request["result"], "wb") as stream:
        np.savez(stream, **found)
    return {"differs": differs, "off_grid": off_grid}


def _fed(entry: Request, rows: Any, batch: int) -> tuple[Any, float]:
    """Samples as the file takes them: filled up to the batch with the last one, and raw pixels where it wants those."""
    import numpy as np

    if not entry["batched"]:
        rows = rows[0]
    elif len(rows) < batch:
        rows = np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])
    return _pixels(rows, entry["pixels"]) if entry["pixels"] else (np.ascontiguousarray(rows), 0.0)


def _built(request: Request) -> Any:
    """The toolkit, with the model of a request built in it."""
    from rknn.api import RKNN  # type: ignore[import-not-found]  # of the environment that this file runs in

    toolkit = RKNN(verbose=True)
    if toolkit.config(target_platform=request["platform"], **request["config"]) not in (0, None):
        raise _Told("BuildError", "the toolkit refuses its configuration")
    names = [entry["name"] for entry in request["inputs"]]
    shapes = [entry["shape"] for entry in request["inputs"]]
    # Failures come both as exceptions and as return codes.
    if toolkit.load_onnx(model=request["model"], inputs=names, input_size_list=shapes) != 0:
        raise _Told("UnsupportedError", "the toolkit cannot load the model")
    how = _dataset(request["quantize"]) if "quantize" in request else {"do_quantization": False}
    if toolkit.build(**how) != 0:
        raise _Told("UnsupportedError", "the toolkit cannot build the model")
    return toolkit


def _dataset(request: Request) -> Request:
    """Arguments of the toolkit's own quantizer: a text file with a line a batch, an .npy for each input in it.

    Raw pixels where mean and deviation are built in, as whole numbers, and in the model's own layout.
    """
    import numpy as np

    with np.load(request["samples"], allow_pickle=False) as archive:
        arrays = [archive[entry["name"]] for entry in request["inputs"]]
    lines = []
    for turn, start in enumerate(range(0, len(arrays[0]), request["batch"])):
        names = []
        for place, (entry, array) in enumerate(zip(request["inputs"], arrays, strict=True)):
            rows, _ = _fed(entry, array[start : start + request["batch"]], request["batch"])
            names.append(f"calibration-{turn}-{place}.npy")
            np.save(names[-1], rows.transpose(0, 3, 1, 2) if entry["pixels"] else rows)
        lines.append(" ".join(names))
    with open("dataset.txt", "w", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n")
    return {"do_quantization": True, "dataset": "dataset.txt"}


def _pixels(rows: Any, how: Request) -> tuple[Any, float]:
    """What the model's input was before its mean and deviation: uint8, NHWC. And how far that was from whole pixels."""
    import numpy as np

    shape = (1, -1, 1, 1)
    raw = rows * np.array(how["std"], np.float32).reshape(shape) + np.array(how["mean"], np.float32).reshape(shape)
    whole = np.clip(np.rint(raw), 0, 255)
    return whole.astype(np.uint8).transpose(0, 2, 3, 1), float(np.abs(raw - whole).max())


def _compare(shipped: str, again: str) -> int:
    """How many bytes of two .rknn files differ; only addresses may, which the toolkit leaves in them.

    Raises if anything else does: then what would be simulated is not what ships.
    """
    import numpy as np

    first, second = (np.fromfile(path, np.uint8) for path in (shipped, again))
    if len(first) != len(second):
        raise _Told("BuildError", f"built again, the file has {len(second)} bytes instead of {len(first)}")
    differ = np.flatnonzero(first != second).tolist()
    both = (first.tobytes(), second.tobytes())
    explained, unexplained = -1, 0
    for place in differ:
        if place <= explained:
            continue
        start = next((start for start in range(max(place - 7, 0), place + 1) if _is_address(both, start)), None)
        if start is None:
            unexplained += 1
        else:
            explained = start + 7
    if unexplained > _UNEXPLAINED:
        raise _Told("BuildError", f"built again, {unexplained} bytes differ that are no addresses of memory")
    return len(differ)


def _is_address(both: tuple[bytes, bytes], start: int) -> bool:
    if start + 8 > len(both[0]):
        return False
    return all(_ADDRESSES[0] <= struct.unpack_from("<Q", data, start)[0] < _ADDRESSES[1] for data in both)


def _begin_anew(request_file: str, answer_file: str) -> None:
    """Run this file again in a folder and an environment of fixed length.

    Both lie on the stack or on the heap, and the addresses that the toolkit leaves in a .rknn file move with them.
    """
    files = [os.path.abspath(file) for file in (request_file, answer_file)]
    request = _read(files[0])
    os.chdir(_folder(os.path.dirname(files[0])))
    for name in (_BUILD, _THEN):
        with open(name, "w", encoding="utf-8") as stream:
            json.dump(request[name.partition(".")[0]], stream, sort_keys=True)
    for path in request["files"]:
        _put(path, os.path.basename(path))
    kept = {name: os.environ[name] for name in ("PYTHONHASHSEED", "OMP_NUM_THREADS") if name in os.environ}
    fixed = {_INSIDE: "1", "PATH": "/usr/bin:/bin", "HOME": ".", "TMPDIR": ".", "PYTHONDONTWRITEBYTECODE": "1"}
    fixed["TQDM_DISABLE"] = "1"  # progress bars hold times, and their lengths shift the heap
    places = [os.path.relpath(file) for file in files]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-s", "-P", os.path.abspath(__file__), *places], {**fixed, **kept})


def _read(path: str) -> Request:
    with open(path, encoding="utf-8") as stream:
        content: Request = json.load(stream)
    return content


def _folder(parent: str) -> str:
    """A folder below ``parent`` whose path has ``_PATH_LENGTH`` characters; one more name where that is too few."""
    missing = _PATH_LENGTH - len(parent) - 1
    folder = os.path.join(parent, "_" * (missing if 0 < missing < 256 else 1))
    os.makedirs(folder, exist_ok=True)
    return folder


def _put(source: str, name: str) -> None:
    """The file under a name of its own here."""
    if os.path.lexists(name):
        os.unlink(name)
    try:
        os.link(source, name)
    except OSError:  # another file system
        shutil.copyfile(source, name)


class _Told(Exception):
    """An error that the caller can read: the name of one of its classes, and what happened."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.answer = {"type": kind, "what": what}


def _sentence(text: str) -> str:
    """The toolkit's own words, behind the last of the tracebacks that it puts into its messages."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    starts = [place for place, line in enumerate(lines) if _RAISED.match(line)]
    words = lines[starts[-1] :] if starts else lines[-1:]
    return _RAISED.sub("", " ".join(words), count=1)[:500]


class _NoTorch:
    """A ``torch`` with the few functions that the toolkit uses of it for ONNX models; the rest of it says so when used.

    The toolkit imports torch at the top of its modules, for a quantizer that is never called here, and reorders the
    indices of a Gather with it.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "torch":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]  # all it needs

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _NoTorchModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "torch":
            given = {"arange": _arange, "cat": _cat, "split": _split, "no_grad": _decorator, "Tensor": _Indices}
            vars(module).update(given)


class _NoTorchModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("nn", "functional"):  # from torch import nn
            return importlib.import_module(f"{self.__name__}.{name}")
        made = type(name, (), {"__new__": _refuse(f"{self.__name__}.{name}")})
        setattr(self, name, made)
        return made


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"the toolkit wants {name}, which its environment leaves out")

    return refuse


def _decorator(*_: Any) -> Callable[[Any], Any]:
    return lambda function: function


class _Indices:
    """A tensor of integers, as far as the toolkit asks."""

    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def reshape(self, *shape: Any) -> _Indices:
        return _Indices(self.array.reshape(*shape))

    def tolist(self) -> list[Any]:
        found: list[Any] = self.array.tolist()
        return found


def _arange(count: int) -> _Indices:
    import numpy as np

    return _Indices(np.arange(count, dtype=np.int64))


def _cat(parts: Any, dim: int = 0) -> _Indices:
    import numpy as np

    return _Indices(np.concatenate([part.array for part in parts], axis=dim))


def _split(whole: _Indices, sizes: list[int], dim: int = 0) -> tuple[_Indices, ...]:
    """Parts of these sizes along ``dim``, as ``torch.split`` with a list."""
    import numpy as np

    ends = np.cumsum(sizes)
    if isinstance(sizes, int) or ends[-1] != whole.shape[dim]:
        raise NotImplementedError(f"split of {whole.shape} into {sizes}")
    return tuple(_Indices(part) for part in np.split(whole.array, ends[:-1], axis=dim))


if __name__ == "__main__":
    main(*sys.argv[1:])
