"""Small models and targets that the tests of the TensorRT driver share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from modelforge.compilers.tensorrt.switches import Switches
from modelforge.recipe import Dim
from modelforge.target import CudaArchitecture, Memory, Peak, Target
from modelforge.toolchains import worker

BATCH = Dim(min=1, opt=4, max=8)
Shape = tuple[int | str, ...]


def gpu(sm: int, *precisions: str, dla: bool = False) -> Target:
    return Target(
        tag=f"sm{sm}",
        title=f"a GPU of compute capability {sm}",
        vendor="nvidia",
        tier="edge",
        compilers=("tensorrt", "tensorrt-rtx"),
        precisions=precisions or ("int8", "mixed", "fp16", "fp32"),  # type: ignore[arg-type]  # literals
        arch=CudaArchitecture(kind="cuda", sm=sm, dla=dla),
        memory=Memory(bytes=1, bandwidth=1.0),
        peak=Peak(),
        notes=(),
        path=Path(f"sm{sm}.toml"),
    )


def ask_builder(model: Path, sm: int, workdir: Path, profiles: list[Any] | None = None, **asked: Any) -> dict[str, Any]:
    """The verdict of the real TensorRT-RTX on a model, with nothing of ours before it."""
    workdir.mkdir(exist_ok=True)
    request = {
        "product": "tensorrt-rtx",
        "model": str(model),
        "engine": str(workdir / "main.engine"),
        "profiles": profiles or [],
        "timing_cache": None,
        **dataclasses.asdict(Switches(capabilities=(sm,), **asked)),
    }
    function = "modelforge.compilers.tensorrt.worker:build"
    return worker.call(function, request, workdir=workdir, timeout=120, what="TensorRT-RTX")


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    weights: Mapping[str, np.ndarray[Any, Any]],
    dtype: Any = np.float32,
    domains: tuple[str, ...] = (),
) -> Path:
    """Inputs and the output ``y`` are of ``dtype``, and so become all float weights."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, element, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", element, None)],
        [
            numpy_helper.from_array(array.astype(dtype) if array.dtype == np.float32 else array, name)
            for name, array in weights.items()
        ],
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def conv_net(path: Path, dtype: Any) -> Path:
    """``x [batch, 1, 8, 8]`` -> Conv, Relu, global mean, Gemm -> ``y [batch, 4]``."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "v"], ["y"], name="classifier"),
    ]
    weights = {
        "w": random.standard_normal((8, 1, 3, 3)).astype(np.float32),
        "v": random.standard_normal((8, 4)).astype(np.float32),
    }
    return save(path, nodes, {"x": ("batch", 1, 8, 8)}, weights, dtype)


def one_node(path: Path, name: str, shape: Shape = (4, 4), **attributes: Any) -> Path:
    domain = attributes.pop("domain", "")
    node = helper.make_node(name, ["x"], ["y"], name="the_node", domain=domain, **attributes)
    return save(path, [node], {"x": shape}, {}, domains=(domain,) if domain else ())
