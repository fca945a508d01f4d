"""Writes a .tflite file from a plain description; run in the ethos-u environment, which has LiteRT's schema.

``python -I write_tflite.py DESCRIPTION.json OUT.tflite``. A double of what a user's own converter gives.
"""

import json
import sys
from pathlib import Path

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_VERSIONS = {
    schema.BuiltinOperator.CONV_2D: 3,
    schema.BuiltinOperator.FULLY_CONNECTED: 4,
    schema.BuiltinOperator.RESHAPE: 1,
}
"""Those that have int8; 2 for the others."""


def main(description, out):
    wanted = json.loads(Path(description).read_text())
    model = schema.ModelT()
    model.version, model.description = 3, b"a test's"
    model.buffers = [schema.BufferT()]
    graph = schema.SubGraphT()
    graph.tensors = [_tensor(model, each) for each in wanted["tensors"]]
    place = {each["name"]: index for index, each in enumerate(wanted["tensors"])}
    codes = []
    graph.operators = []
    for each in wanted["operators"]:
        code = getattr(schema.BuiltinOperator, each["op"])
        if code not in codes:
            codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = codes.index(code)
        operator.inputs = [place[name] for name in each["inputs"]]
        operator.outputs = [place[each["output"]]]
        if each["options"] is not None:
            kind = each["options"].pop("kind")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            operator.builtinOptions = getattr(schema, f"{kind}T")()
            for key, value in each["options"].items():
                setattr(operator.builtinOptions, key, value)
        graph.operators.append(operator)
    graph.inputs = [place[name] for name in wanted["inputs"]]
    graph.outputs = [place[name] for name in wanted["outputs"]]
    model.operatorCodes = []
    for code in codes:
        entry = schema.OperatorCodeT()
        entry.builtinCode = entry.deprecatedBuiltinCode = code
        entry.version = _VERSIONS.get(code, 2)
        model.operatorCodes.append(entry)
    model.subgraphs = [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    Path(out).write_bytes(builder.Output())


def _tensor(model, wanted):
    tensor = schema.TensorT()
    tensor.name, tensor.shape = wanted["name"].encode(), wanted["shape"]
    tensor.type = getattr(schema.TensorType, wanted["dtype"].upper())
    if wanted["data"] is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.array(wanted["data"], wanted["dtype"]).tobytes(), np.uint8)
        model.buffers.append(buffer)
        tensor.buffer = len(model.buffers) - 1
    if wanted["scale"] is not None:
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale = np.array(wanted["scale"], np.float32)
        tensor.quantization.zeroPoint = np.array(wanted["zero"], np.int64)
    return tensor


main(*sys.argv[1:])
