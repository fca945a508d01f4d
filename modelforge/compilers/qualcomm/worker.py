"""Speaks for ONNX Runtime's QNN provider in its own environment: one file, the standard library and vendor modules.

``python -I worker.py REQUEST.json ANSWER.json``. Actions: ``build`` saves the context of a model with fixed shapes;
``emulate`` loads a saved context into QNN's x86 emulation of the HTP and runs it over samples.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

NAME = "QNNExecutionProvider"


def main(request_file: str, answer_file: str) -> None:
    with open(request_file, encoding="utf-8") as stream:
        request = json.load(stream)
    try:
        answer = {"result": {"build": build, "emulate": emulate}[request["action"]](request)}
    except Exception as error:  # pybind's errors and NumPy's alike: one clear failure of this call
        traceback.print_exc()
        answer = {"error": {"type": "BuildError", "what": _first_line(error)}}
    with open(answer_file + ".part", "w", encoding="utf-8") as stream:
        json.dump(answer, stream)
    os.replace(answer_file + ".part", answer_file)
    sys.stdout.flush()
    sys.stderr.flush()
    # No interpreter shutdown: QNN's libraries tear their threads down in an order of their own.
    os._exit(0)


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Save ``context`` from ``model``: a wrapper in ONNX, and a ``.bin`` beside it unless ``embed`` says inside."""
    entries = {
        "ep.context_enable": "1",
        "ep.context_file_path": request["context"],
        "ep.context_embed_mode": "1" if request["embed"] else "0",
    }
    if os.path.exists(request["model"] + ".data"):
        os.symlink(os.path.dirname(request["model"]), "lowered")
        entries["session.model_external_initializers_file_folder_path"] = "lowered"
    # As bytes, without a path of this machine: the name of the context, inside the .bin, holds a hash of the path.
    with open(request["model"], "rb") as stream:
        _session(stream.read(), request["provider"], entries)
    return {}


def emulate(request: dict[str, Any]) -> dict[str, Any]:
    """Outputs of the samples into ``result`` (.npz), samples along the first axis; ``batch`` of them at a time."""
    import numpy as np

    session = _session(request["context"], request["provider"], {})
    batch, batched = request["batch"], request["batched"]
    with np.load(request["samples"], allow_pickle=False) as archive:
        arrays = {each.name: archive[each.name] for each in session.get_inputs()}
    count = len(next(iter(arrays.values())))
    names = [each.name for each in session.get_outputs()]
    kept: dict[str, list[Any]] = {name: [] for name in names}
    for first in range(0, count, batch):
        rows = [min(row, count - 1) for row in range(first, first + batch)]  # the last one fills up
        used = min(batch, count - first)
        feeds = {name: array[rows] if name in batched else array[first] for name, array in arrays.items()}
        for name, value in zip(names, session.run(None, feeds), strict=True):
            kept[name].append(value[:used] if name in batched else value[np.newaxis])
    with open(request["result"], "wb") as stream:
        np.savez(stream, allow_pickle=False, **{name: np.concatenate(values) for name, values in kept.items()})
    return {"samples": count}


def _session(model: str | bytes, provider: Mapping[str, str], entries: Mapping[str, str]) -> Any:
    """A session on QNN's HTP alone: a node that it cannot have is an error and never goes to the CPU."""
    import onnxruntime

    qnn = importlib.import_module("onnxruntime_qnn")
    onnxruntime.register_execution_provider_library(NAME, qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == NAME]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    options.add_provider_for_devices(devices[:1], {"backend_path": qnn.get_qnn_htp_path(), **provider})
    return onnxruntime.InferenceSession(model, options)


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text.removeprefix("[ONNXRuntimeError] : ")


if __name__ == "__main__":
    main(*sys.argv[1:])
