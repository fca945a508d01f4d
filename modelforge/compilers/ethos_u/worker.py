"""Speaks for Vela and LiteRT in their own environment: one file, the standard library and vendor modules.

``python -I worker.py REQUEST.json ANSWER.json``. Actions: ``inspect`` tells what a .tflite file takes and gives;
``compile`` runs Vela; ``run`` runs a .tflite file over samples with LiteRT.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import traceback
from typing import Any


def main(request_file: str, answer_file: str) -> None:
    with open(request_file, encoding="utf-8") as stream:
        request = json.load(stream)
    actions = {"inspect": inspect, "compile": compile_model, "run": run}
    try:
        answer = {"result": actions[request["action"]](request)}
    except (Exception, SystemExit) as error:  # Vela ends the program where it refuses a file; LiteRT raises anything
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        answer = {"error": {"type": "BuildError", "what": f"{type(error).__name__}: {first}"}}
    with open(answer_file + ".part", "w", encoding="utf-8") as out:
        json.dump(answer, out)
    os.replace(answer_file + ".part", answer_file)
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)  # what Vela's C++ printed: the operators that the NPU cannot have are in it
    os._exit(0)


def inspect(request: dict[str, Any]) -> dict[str, Any]:
    """Inputs and outputs: name, dtype, shape, scale and zero point (None where it is not quantized by one number)."""
    model = _interpreter(request["model"])
    return {
        "inputs": [_port(each) for each in model.get_input_details()],
        "outputs": [_port(each) for each in model.get_output_details()],
    }


def compile_model(request: dict[str, Any]) -> dict[str, Any]:
    """``vela model.tflite ...`` in the working folder; its result and its CSV are named in the answer."""
    os.symlink(request["model"], "main.tflite")  # Vela names its files after the model's
    code = importlib.import_module("ethosu.vela.vela").main(
        ["main.tflite", "--output-dir", "vela", *request["options"]]
    )
    if code:
        raise RuntimeError(f"Vela ended with {code}")
    summaries = sorted(name for name in os.listdir("vela") if name.endswith(".csv"))
    return {"artifact": "vela/main_vela.tflite", "summaries": [f"vela/{name}" for name in summaries]}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Outputs of the samples into ``result`` (.npz) as floats, samples along the first axis.

    Values are quantized and dequantized with the file's own parameters; ``permute`` of a port says how an array comes
    from the layout of the ONNX model into that of the file (inputs), and back (outputs).
    """
    import numpy as np

    model = _interpreter(request["model"])
    inputs = {each["name"]: each for each in model.get_input_details()}
    outputs = {each["name"]: each for each in model.get_output_details()}
    with np.load(request["samples"], allow_pickle=False) as archive:
        arrays = {port["name"]: archive[port["name"]] for port in request["inputs"]}
    count = len(next(iter(arrays.values())))
    kept: dict[str, list[Any]] = {port["name"]: [] for port in request["outputs"]}
    for index in range(count):
        for port in request["inputs"]:
            detail, value = inputs[port["tensor"]], arrays[port["name"]]
            value = value[index : index + 1] if port["batched"] else value[index]
            model.set_tensor(detail["index"], _quantized(np, value.transpose(port["permute"]), detail))
        model.invoke()
        for port in request["outputs"]:
            detail = outputs[port["tensor"]]
            value = _dequantized(np, model.get_tensor(detail["index"]), detail).transpose(port["permute"])
            kept[port["name"]].append(value if port["batched"] else value[np.newaxis])
    with open(request["result"], "wb") as stream:
        np.savez(stream, allow_pickle=False, **{name: np.concatenate(values) for name, values in kept.items()})
    return {"samples": count}


def _quantized(np: Any, value: Any, detail: Any) -> Any:
    scale, zero = detail["quantization"]
    if not scale:
        return value.astype(detail["dtype"])
    limits = np.iinfo(detail["dtype"])
    return np.clip(np.rint(value / np.float32(scale)) + zero, limits.min, limits.max).astype(detail["dtype"])


def _dequantized(np: Any, value: Any, detail: Any) -> Any:
    scale, zero = detail["quantization"]
    return ((value.astype(np.int32) - zero) * np.float32(scale)).astype(np.float32) if scale else value


def _port(detail: Any) -> dict[str, Any]:
    scale, zero = detail["quantization"]
    return {
        "tensor": detail["name"],
        "dtype": detail["dtype"].__name__,
        "shape": [int(size) for size in detail["shape"]],
        "scale": float(scale) or None,
        "zero_point": int(zero) if scale else None,
    }


def _interpreter(model: str) -> Any:
    litert = importlib.import_module("ai_edge_litert.interpreter")
    # The reference kernels: the plain ones, without what this machine's CPU would round otherwise.
    kernels = litert.OpResolverType.BUILTIN_REF
    interpreter = litert.Interpreter(model_path=model, num_threads=1, experimental_op_resolver_type=kernels)
    interpreter.allocate_tensors()
    return interpreter


if __name__ == "__main__":
    main(*sys.argv[1:])
