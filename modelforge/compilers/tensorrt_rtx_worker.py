"""The child's side of :mod:`modelforge.compilers.tensorrt_rtx`: parse, build, write. Only here is NVIDIA's code loaded.

TensorRT never raises: ``parse`` gives False, ``build`` gives None, and a file of garbage parses to an empty network.
Every such answer becomes an error here that names the node or the rule.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

from modelforge.errors import BuildError, ModelForgeError, UnsupportedError

# Said after every error on a machine without a GPU, and beside the point: the build needs none.
_MISLEADING = re.compile(r"cudaError ?35|CUDA driver version is insufficient|CUDA initialization failure", re.I)

# What the builder says -> what that means: pattern, error class, what, fix.
_MEANINGS: tuple[tuple[str, type[ModelForgeError], str, str], ...] = (
    (
        r"Turing \(SM75\)",
        UnsupportedError,
        "compute capability 7.5 cannot have this node in FP32",
        "build at fp16 with that node in FP16: no MatMul, Gemm, Einsum, recurrent layer or 3-D Conv may stay FP32",
    ),
    (
        r"HW-specific datatypes",
        UnsupportedError,
        "the model holds a data type that this GPU does not have",
        "use fp16 instead of bfloat16 or FP8",
    ),
    (
        r"OutOfMemory|within workspace limit",
        BuildError,
        "the workspace limit is too low for this model",
        "raise the option `workspace_bytes`",
    ),
    (
        r"MIN<=OPT<=MAX|contradictory IOptimizationProfile|Dimension mismatch|dimensions but profile",
        BuildError,
        "the sizes given for the inputs do not fit the model or each other",
        "check [inputs] against the model, `min` <= `opt` <= `max` under [dims], and one size per symbol",
    ),
)


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build one engine.

    Args:
        request: ``model``: path of the ONNX file; ``engine``: path to write; ``sm``: compute capability without its
            dot; ``profile``: by input name, three shapes: min, opt, max; ``workspace_bytes``: int or None.

    Returns:
        ``version``, ``layers``, ``inputs`` and ``outputs`` (name, dtype, shape; -1 where dynamic), ``warnings``.

    Raises:
        UnsupportedError: TensorRT-RTX cannot have this model for this GPU.
        BuildError: it failed, or wrote nothing.
    """
    logger = _Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(network, logger, request["model"])
    config = builder.create_builder_config()
    _choose_capability(config, request["sm"])
    if request["workspace_bytes"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    _add_profile(builder, config, network, request["profile"], logger)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _build_failure(logger)
    path = Path(request["engine"])
    with path.open("wb") as stream:
        stream.write(engine)
    return {
        "version": trt.__version__,
        "layers": network.num_layers,
        "inputs": [_tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(index)) for index in range(network.num_outputs)],
        "warnings": logger.told(trt.ILogger.WARNING),
    }


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """What the installed TensorRT-RTX can have: its compute capabilities, and which of ``request["ops"]`` it parses.

    The data in :mod:`modelforge.compilers.tensorrt_rtx` is checked against this answer.
    """
    logger = _Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return {
        "version": trt.__version__,
        "sm": sorted(int(name.removeprefix("SM")) for name in names),
        "ops": sorted(op for op in request["ops"] if parser.supports_operator(op)),
    }


class _Logger(trt.ILogger):  # type: ignore[misc]  # the vendor package has no types
    """Keeps what TensorRT says: all of it in the child's log, warnings and errors for messages."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[tuple[Any, str]] = []

    def log(self, severity: Any, message: str) -> None:
        if severity == trt.ILogger.VERBOSE:
            return
        print(f"[{severity.name}] {message}", flush=True)  # noqa: T201  # stdout is the log of this child
        if severity != trt.ILogger.INFO and not _MISLEADING.search(message):
            self._lines.append((severity, message.strip()))

    def told(self, *severities: Any) -> list[str]:
        """What was said at these severities, each once, in order."""
        return list(dict.fromkeys(message for severity, message in self._lines if severity in severities))

    def errors(self) -> list[str]:
        return self.told(trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)


def _parse(network: Any, logger: _Logger, model: str) -> None:
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(model)
    if parser.num_errors:
        raise _parse_failure(parser)
    if not parsed:
        raise BuildError("the parser failed and named no error", fix="\n".join(logger.errors()) or None)
    if network.num_layers == 0 or network.num_outputs == 0:
        # A file that is not ONNX at all parses "well", to nothing.
        raise BuildError(
            f"the model parsed to an empty network: {network.num_layers} layers, {network.num_outputs} outputs",
            fix="the file is not an ONNX model, or the model computes nothing",
        )


def _parse_failure(parser: Any) -> ModelForgeError:
    error = parser.get_error(0)
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    code = error.code().name
    operator, node = error.node_operator(), error.node_name()
    what = f"the parser refused {operator or 'the model'}, {code}: {error.desc()}{more}"
    nameless = f"node number {error.node()}" if error.node() >= 0 else None
    where = f"node {node}" if node else nameless
    if code.startswith("UNSUPPORTED") or operator:
        fix = "export the model with operators and types that TensorRT-RTX has"
        return UnsupportedError(what, where=where, fix=fix)
    return BuildError(what, fix="the ONNX file is missing, damaged or truncated")


def _choose_capability(config: Any, sm: int) -> None:
    """Declare the GPU. Never CURRENT or NONE: with none declared, FP32 products on Turing gave zeros in silence."""
    capability = trt.ComputeCapability.__members__.get(f"SM{sm}")
    if capability is None:
        raise UnsupportedError(f"TensorRT-RTX {trt.__version__} has no compute capability {sm}")
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(capability, 0):
        raise BuildError(f"TensorRT-RTX did not accept compute capability {sm}")


def _add_profile(builder: Any, config: Any, network: Any, profile: dict[str, list[list[int]]], logger: _Logger) -> None:
    inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    unknown = sorted(set(profile) - set(inputs))
    if unknown:
        # TensorRT takes any name here without a word.
        raise BuildError(f"the model has no input {unknown[0]}", fix=f"its inputs are {', '.join(sorted(inputs))}")
    shapes = builder.create_optimization_profile()
    for name, tensor in inputs.items():
        if tensor.is_shape_tensor:
            raise UnsupportedError(
                "the values of this input decide shapes; a profile over its values is not supported",
                where=f"input {name}",
                fix="make it a constant of the model",
            )
        if name not in profile:
            if -1 in tensor.shape:
                raise BuildError("the input has dynamic dimensions and no bounds", where=f"input {name}")
            continue
        shapes.set_shape(name, *profile[name])
    # set_shape says nothing of min > opt; only this does, with -1.
    if profile and config.add_optimization_profile(shapes) < 0:
        raise _build_failure(logger)


def _build_failure(logger: _Logger) -> ModelForgeError:
    said = logger.errors()
    for pattern, kind, meaning, fix in _MEANINGS:
        for message in said:
            if re.search(pattern, message):
                return kind(f"{meaning}: {message}", where=_node_in(message), fix=fix)
    if not said:
        return BuildError("the builder gave no engine and no reason")
    more = "\n".join(said[1:])
    return BuildError(f"the builder gave no engine: {said[0]}", where=_node_in(said[0]), fix=more or None)


def _node_in(message: str) -> str | None:
    found = re.search(r"(?:\[ONNX Layer: |Cannot compile operation ')([^\]']+)", message)
    return f"node {found.group(1)}" if found else None


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": str(tensor.dtype).removeprefix("DataType."), "shape": list(tensor.shape)}
