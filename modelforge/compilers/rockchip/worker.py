"""Speaks for RKNN-Toolkit2 in its own environment: one file, the standard library and the vendor's modules.

``python -s -P worker.py REQUEST.json ANSWER.json``. Actions: ``build`` writes a .rknn file; ``simulate`` builds it
again, holds it against the one that ships, and runs it in the toolkit's PC simulator.
"""

import ctypes
import importlib.machinery
import json
import os
import re
import struct
import sys
import types

_INSIDE = "MODELFORGE_RKNN_WORKER"
_ADDRESSES = (1 << 40, 1 << 47)
_UNEXPLAINED = 64
"""How many bytes may differ beside whole addresses: halves of them, in padding that the toolkit does not clear."""


def main(request_file, answer_file):
    if _INSIDE not in os.environ:
        _begin_anew(request_file, answer_file)
    with open(request_file, encoding="utf-8") as stream:
        request = json.load(stream)
    sys.meta_path.insert(0, _NoTorch())
    try:
        answer = {"result": {"build": build, "simulate": simulate}[request["action"]](request)}
    except _Told as error:
        answer = {"error": error.answer}
    except Exception as error:  # the toolkit raises anything, and what it raises holds its own traceback as text
        answer = {"error": {"type": "BuildError", "what": _last_line(str(error)) or type(error).__name__}}
    with open(answer_file + ".part", "w", encoding="utf-8") as stream:
        json.dump(answer, stream)
    os.replace(answer_file + ".part", answer_file)
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)  # what the toolkit's C++ printed: its table of layers is in it
    # No interpreter shutdown: what the toolkit's libraries do in it decides nothing any more.
    os._exit(0)


def build(request):
    toolkit = _built(request)
    if toolkit.export_rknn(request["artifact"]) != 0 or not os.path.isfile(request["artifact"]):
        raise _Told("BuildError", "the toolkit wrote no .rknn file")
    return {"artifact": request["artifact"]}


def simulate(request):
    """Outputs of the samples, one array a model output, samples along the first axis."""
    import numpy as np

    toolkit = _built(request)
    again = "again.rknn"
    if toolkit.export_rknn(again) != 0:
        raise _Told("BuildError", "the toolkit wrote no .rknn file")
    differs = _compare(request["artifact"], again)
    if toolkit.init_runtime() != 0:
        raise _Told("BuildError", "the toolkit's simulator does not start")
    with np.load(request["samples"], allow_pickle=False) as archive:
        arrays = [archive[entry["name"]] for entry in request["inputs"]]
    formats = ["nhwc" if entry["pixels"] else "nchw" for entry in request["inputs"]]
    outputs = [[] for _ in request["outputs"]]
    off_grid = 0.0
    for start in range(0, len(arrays[0]), request["batch"]):
        fed = []
        for entry, array in zip(request["inputs"], arrays):
            rows = array[start : start + request["batch"]]
            if not entry["batched"]:
                rows = rows[0]
            elif len(rows) < request["batch"]:  # the last ones: filled up with the last sample
                rows = np.concatenate([rows, np.repeat(rows[-1:], request["batch"] - len(rows), axis=0)])
            if entry["pixels"]:
                rows, distance = _pixels(rows, entry["pixels"])
                off_grid = max(off_grid, distance)
            fed.append(np.ascontiguousarray(rows))
        given = toolkit.inference(inputs=fed, data_format=formats)
        if given is None or len(given) != len(outputs):
            raise _Told("BuildError", "the toolkit's simulator gave no outputs")
        count = min(request["batch"], len(arrays[0]) - start)
        for place, (array, entry) in enumerate(zip(given, request["outputs"])):
            outputs[place].append(array[:count] if entry["batched"] else array[None])
    found = {entry["name"]: np.concatenate(rows) for entry, rows in zip(request["outputs"], outputs)}
    with open(request["result"], "wb") as stream:
        np.savez(stream, **found)
    return {"differs": differs, "off_grid": off_grid}


def _built(request):
    """The toolkit, with the model of a request built in it."""
    from rknn.api import RKNN

    # Relative names: a path of another length would move everything on the heap, and addresses get into the file.
    model = os.path.join("lowered", os.path.basename(request["model"]))
    if not os.path.lexists("lowered"):
        os.symlink(os.path.dirname(request["model"]), "lowered")
    toolkit = RKNN(verbose=True)
    if toolkit.config(target_platform=request["platform"], **request["config"]) not in (0, None):
        raise _Told("BuildError", "the toolkit refuses its configuration")
    names = [entry["name"] for entry in request["inputs"]]
    shapes = [entry["shape"] for entry in request["inputs"]]
    # Failures come both as exceptions and as return codes.
    if toolkit.load_onnx(model=model, inputs=names, input_size_list=shapes) != 0:
        raise _Told("UnsupportedError", "the toolkit cannot load the model")
    if toolkit.build(do_quantization=False) != 0:
        raise _Told("UnsupportedError", "the toolkit cannot build the model")
    return toolkit


def _pixels(rows, how):
    """What the model's input was before its mean and deviation: uint8, NHWC. And how far that was from whole pixels."""
    import numpy as np

    shape = (1, -1, 1, 1)
    raw = rows * np.array(how["std"], np.float32).reshape(shape) + np.array(how["mean"], np.float32).reshape(shape)
    whole = np.clip(np.rint(raw), 0, 255)
    return whole.astype(np.uint8).transpose(0, 2, 3, 1), float(np.abs(raw - whole).max())


def _compare(shipped, again):
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


def _is_address(both, start):
    if start + 8 > len(both[0]):
        return False
    return all(_ADDRESSES[0] <= struct.unpack_from("<Q", data, start)[0] < _ADDRESSES[1] for data in both)


def _begin_anew(request_file, answer_file):
    """Run this file again with names and an environment that are the same wherever it was started.

    Both lie on the stack and shift the heap, so that their lengths would show in the .rknn file.
    """
    for file, name in ((request_file, "request.json"), (answer_file, "answer.json")):
        if os.path.realpath(file) != os.path.realpath(name):
            raise SystemExit("the worker is run in the folder of its request and answer")
    kept = {name: os.environ[name] for name in ("PYTHONHASHSEED", "OMP_NUM_THREADS") if name in os.environ}
    fixed = {_INSIDE: "1", "PATH": "/usr/bin:/bin", "HOME": ".", "TMPDIR": ".", "PYTHONDONTWRITEBYTECODE": "1"}
    argv = [sys.executable, "-s", "-P", os.path.abspath(__file__), "request.json", "answer.json"]
    sys.stdout.flush()
    os.execve(sys.executable, argv, {**fixed, **kept})


class _Told(Exception):
    """An error that the caller can read: the name of one of its classes, and what happened."""

    def __init__(self, kind, what):
        super().__init__(what)
        self.answer = {"type": kind, "what": what}


def _last_line(text):
    """The toolkit's own sentence, at the end of the tracebacks that it puts into its messages."""
    clean = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip() for line in clean.splitlines() if line.strip()]
    return re.sub(r"^[A-Za-z]*(Error|Exception): ", "", lines[-1]) if lines else ""


class _NoTorch:
    """A ``torch`` that can be imported, subclassed and used as a decorator, and does nothing.

    The toolkit imports it at the top of its modules for its ``gdq`` quantizer, which is never called here.
    """

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "torch":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _NoTorchModule(spec.name)

    def exec_module(self, module):
        pass


class _NoTorchModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = _decorator if name == "no_grad" else type(name, (), {})
        setattr(self, name, made)
        return made


def _decorator(*_):
    return lambda function: function


if __name__ == "__main__":
    main(*sys.argv[1:])
