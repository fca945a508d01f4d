"""Models that the tests of TVM share, and a way to run what was made of them."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers.protocol import Compiled, Ran, RunJob
from modelforge.compilers.tvm import TvmCompiler
from modelforge.recipe import Dim
from modelforge.target import CpuArchitecture, Registry, Target
from modelforge.toolchains import qemu

INPUTS: dict[str, tuple[int | str, ...]] = {"x": ("batch", 3, 16, 20)}
DIMS = {"batch": Dim(min=1, opt=4, max=8)}
Arrays = dict[str, np.ndarray]


def cortex_a76() -> Target:
    return Registry().get("cortex-a76")


def this_machine() -> Target:
    """A profile that every machine of this instruction set can run."""
    isa = {"x86_64": "x86-64", "aarch64": "aarch64"}[platform.machine()]
    arch = CpuArchitecture(
        kind="cpu", isa=isa, mcpu={"x86-64": "x86-64", "aarch64": "generic"}[isa], cores=2, vector_bits=128
    )
    return dataclasses.replace(cortex_a76(), tag="this-machine", precisions=("fp32",), arch=arch)


def needs_qemu() -> None:
    if qemu.find() is None:
        pytest.skip(qemu.why_not())


def conv_net(dtype: str = "float32") -> onnx.ModelProto:
    """Convolution, depthwise convolution with stride, SiLU, both poolings, Gemm, softmax; two outputs."""
    rng = np.random.default_rng(1)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) * 0.2).astype(dtype), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], name="conv1"),
        helper.make_node("Clip", ["c1", "zero", "six"], ["r1"], name="relu6"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1, 1, 1, 1], strides=[2, 2], group=8, name="depthwise"),
        helper.make_node("Sigmoid", ["c2"], ["s"]),
        helper.make_node("Mul", ["c2", "s"], ["m"]),
        helper.make_node("MaxPool", ["m"], ["features/map"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["features/map"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["l"], transB=1),
        helper.make_node("Softmax", ["l"], ["y"], axis=1),
    ]
    weights = [
        weight("w1", 8, 3, 3, 3),
        weight("b1", 8),
        weight("w2", 8, 1, 3, 3),
        weight("w3", 10, 8),
        weight("b3", 10),
    ]
    bounds = [numpy_helper.from_array(np.array(value, dtype), name) for name, value in (("zero", 0), ("six", 6))]
    return make_model(
        nodes,
        [helper.make_tensor_value_info("x", kind, ["batch", 3, 16, 20])],
        [
            helper.make_tensor_value_info("y", kind, ["batch", 10]),
            helper.make_tensor_value_info("features/map", kind, ["batch", 8, 4, 5]),
        ],
        [*weights, *bounds],
    )


def light(name: str) -> onnx.ModelProto:
    """A model that onnx carries, with random weights: its own are all the same number."""
    model = onnx.load(Path(onnx.__file__).parent / f"backend/test/data/light/light_{name}.onnx")
    rng = np.random.default_rng(5)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kept = [node for node in model.graph.node if node.op_type != "ConstantOfShape"]
    norms = [node for node in kept if node.op_type == "BatchNormalization"]
    positive = {name: spread for node in norms for name, spread in ((node.input[1], 0.3), (node.input[4], 1.0))}
    for node in model.graph.node:
        if node.op_type == "ConstantOfShape":
            (name,), shape = node.output, tuple(int(size) for size in shapes[node.input[0]])
            weight = rng.standard_normal(shape) * (2 / max(1, np.prod(shape[1:]))) ** 0.5
            if name in positive:  # scales and variances, such that a deep net neither fades nor overflows
                weight = positive[name] * rng.uniform(0.5, 1.5, shape)
            elif len(shape) == 1:
                weight *= 0.1
            model.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    for field in (model.graph.initializer, model.graph.input):
        left = [each for each in field if each.name in used]
        del field[:]
        field.extend(left)
    return model


def make_model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "test", inputs, outputs, weights or [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def value(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled model, and a way to run it."""

    model: Path
    target: Target
    compiled: Compiled

    def job(self, arrays: Arrays, folder: Path, batch: int = 1, timed: tuple[int, ...] = ()) -> RunJob:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "in.npz", **arrays)
        return RunJob(
            files=self.compiled.files,
            artifact=self.compiled.artifact,
            target=self.target,
            inputs=folder / "in.npz",
            batch=batch,
            outputs=folder / "out.npz",
            workdir=folder / "work",
            timeout=300.0,
            timed=timed,
        )

    def run(self, arrays: Arrays, folder: Path, batch: int = 1, timed: tuple[int, ...] = ()) -> tuple[Arrays, Ran]:
        ran = TvmCompiler().run(self.job(arrays, folder, batch, timed))
        with np.load(folder / "out.npz") as outputs:
            return dict(outputs), ran


Build = Callable[..., Built]
