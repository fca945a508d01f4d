"""The child's side of a build: parse, configure, build, write. One path for TensorRT 10.3 to 11 and TensorRT-RTX.

TensorRT never raises: ``parse`` gives False, ``build`` gives None, and a file of garbage parses to an empty network.
Every such answer becomes an error here that names the node or the rule.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelforge.compilers.tensorrt.messages import failure
from modelforge.compilers.tensorrt.product import PRODUCTS, only
from modelforge.compilers.tensorrt.vendor import Heard, listen, load
from modelforge.errors import BuildError, ModelForgeError, UnsupportedError

if TYPE_CHECKING:
    import tensorrt_rtx as vendor


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build one engine.

    Args:
        request: ``product`` and ``folder``: what to load, and from where; ``model``: path of the ONNX file; ``engine``:
            path to write; ``capabilities``: compute capabilities without their dot; ``profiles``: for each, by input
            name, three shapes: min, opt, max; ``timing_cache``: paths ``read`` and ``write``, or None; the
            other fields of :class:`~modelforge.compilers.tensorrt.switches.Switches`.

    Returns:
        ``version``, ``layers``, ``inputs`` and ``outputs`` (name, dtype, shape; -1 where dynamic), ``warnings``,
        ``seconds`` (of parsing and of building), ``dla`` (layers there and on the GPU, or None),
        ``timing_caches_used`` (paths).

    Raises:
        UnsupportedError: the toolchain cannot have this model for this GPU, or does not have an option.
        ToolchainMissing: it cannot be loaded, or finds no GPU where it needs one.
        BuildError: it failed, or wrote nothing.
    """
    trt = load(request)
    heard = Heard(PRODUCTS[request["product"]].needs_gpu)
    logger = listen(trt, heard)
    builder = _new_builder(trt, logger, heard)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    begun = time.monotonic()
    _parse(trt, network, logger, heard, request["model"])
    parsed = time.monotonic()
    config = builder.create_builder_config()
    if PRODUCTS[request["product"]].names_capabilities:
        _name_capabilities(trt, config, request["capabilities"])
    _configure(trt, config, request)
    dla = None if request["dla_core"] is None else _use_dla(trt, builder, config, network, request["dla_core"])
    _add_profiles(builder, config, network, request["profiles"], heard)
    used = _read_timing_caches(config, request["timing_cache"], heard)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise failure(heard.errors(), "the builder gave no engine")
    with Path(request["engine"]).open("wb") as stream:
        stream.write(engine)
    _write_timing_cache(config, request["timing_cache"])
    return {
        "version": trt.__version__,
        "layers": network.num_layers,
        "inputs": [_tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(index)) for index in range(network.num_outputs)],
        "warnings": heard.warnings(),
        "seconds": {"parse": round(parsed - begun, 3), "build": round(time.monotonic() - parsed, 3)},
        "dla": dla,
        "timing_caches_used": used,
    }


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """What the installed TensorRT-RTX can have: its compute capabilities, and which of ``request["ops"]`` it parses.

    The data in :mod:`modelforge.compilers.tensorrt.preflight` is checked against this answer.
    """
    trt = load({"product": "tensorrt-rtx"})
    logger = listen(trt, Heard(needs_gpu=False))
    builder: vendor.Builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser: vendor.OnnxParser = trt.OnnxParser(network, logger)
    return {
        "version": trt.__version__,
        "sm": sorted(_capabilities(trt)),
        "ops": sorted(op for op in request["ops"] if parser.supports_operator(op)),
    }


@only("tensorrt-rtx")
def _capabilities(trt: Any) -> list[int]:
    names: list[str] = list(trt.ComputeCapability.__members__)
    return [int(name.removeprefix("SM")) for name in names if name.startswith("SM")]


def _new_builder(trt: Any, logger: vendor.ILogger, heard: Heard) -> vendor.Builder:
    try:
        builder: vendor.Builder = trt.Builder(logger)
    except TypeError as error:  # pybind11's word for a factory that gave nothing: no driver, or no GPU
        raise failure(heard.errors(), f"there is no builder: {error}") from error
    return builder


def _parse(trt: Any, network: vendor.INetworkDefinition, logger: vendor.ILogger, heard: Heard, model: str) -> None:
    parser: vendor.OnnxParser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(model)
    if parser.num_errors:
        raise _parse_failure(parser)
    if not parsed:
        raise BuildError("the parser failed and named no error", fix="\n".join(heard.errors()) or None)
    if network.num_layers == 0 or network.num_outputs == 0:
        # A file that is not ONNX at all parses "well", to nothing.
        raise BuildError(
            f"the model parsed to an empty network: {network.num_layers} layers, {network.num_outputs} outputs",
            fix="the file is not an ONNX model, or the model computes nothing",
        )


def _parse_failure(parser: vendor.OnnxParser) -> ModelForgeError:
    error: vendor.ParserError = parser.get_error(0)
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    code: str = error.code().name
    operator, node = error.node_operator(), error.node_name()
    what = f"the parser refused {operator or 'the model'}, {code}: {error.desc()}{more}"
    nameless = f"node number {error.node()}" if error.node() >= 0 else None
    where = f"node {node}" if node else nameless
    if code.startswith("UNSUPPORTED") or operator:
        return UnsupportedError(what, where=where, fix="export the model with operators and types that TensorRT has")
    return BuildError(what, fix="the ONNX file is missing, damaged or truncated")


@only("tensorrt-rtx")
def _name_capabilities(trt: Any, config: vendor.IBuilderConfig, capabilities: list[int]) -> None:
    """Never CURRENT or NONE: with none named, FP32 products on Turing gave zeros in silence."""
    missing = sorted(set(capabilities) - set(_capabilities(trt)))
    if missing:
        raise UnsupportedError(f"TensorRT-RTX {trt.__version__} has no compute capability {missing[0]}")
    config.num_compute_capabilities = len(capabilities)
    for place, sm in enumerate(capabilities):
        if not config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{sm}"], place):
            raise BuildError(f"TensorRT-RTX did not accept compute capability {sm}")


def _configure(trt: Any, config: vendor.IBuilderConfig, request: dict[str, Any]) -> None:
    """The options of the recipe. Each was checked before; what is not asked for is left at its default."""
    if request["workspace_bytes"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
    if request["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if request["strip_plan"]:
        # "Identical" promises that the weights put back are these ones: the engine is as fast as a whole one.
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]
    if request["hardware"] is not None:
        levels: dict[str, Any] = trt.HardwareCompatibilityLevel.__members__
        if request["hardware"] not in levels:
            raise UnsupportedError(f"TensorRT {trt.__version__} has no hardware compatibility {request['hardware']}")
        config.hardware_compatibility_level = levels[request["hardware"]]


def _use_dla(
    trt: Any, builder: vendor.Builder, config: vendor.IBuilderConfig, network: vendor.INetworkDefinition, core: int
) -> dict[str, Any]:
    """Put on the DLA what it can have, the rest on the GPU; says which is which."""
    if core >= builder.num_DLA_cores:
        raise UnsupportedError(
            f"there is no DLA core {core}: this device has {builder.num_DLA_cores}", fix="leave `dla_core` out"
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    fallback: list[str] = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if not config.can_run_on_DLA(layer):
            fallback.append(layer.name)
    if len(fallback) == network.num_layers:
        raise UnsupportedError("no layer of this model can run on a DLA", fix="leave `dla_core` out")
    return {"core": core, "layers": network.num_layers - len(fallback), "on_gpu": fallback}


def _add_profiles(
    builder: vendor.Builder,
    config: vendor.IBuilderConfig,
    network: vendor.INetworkDefinition,
    profiles: list[dict[str, list[list[int]]]],
    heard: Heard,
) -> None:
    _check_profiles(network, profiles)
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in sizes.items():
            profile.set_shape(name, shapes[0], shapes[1], shapes[2])
        # set_shape says nothing of a shape that does not fit; only this does, with -1.
        if config.add_optimization_profile(profile) < 0:
            raise failure(heard.errors(), "the builder took no optimisation profile")


def _check_profiles(network: vendor.INetworkDefinition, profiles: list[dict[str, list[list[int]]]]) -> None:
    """TensorRT takes any name, and any order of sizes, without a word."""
    known: list[str] = []
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        name: str = tensor.name
        known.append(name)
        if tensor.is_shape_tensor:
            raise UnsupportedError(
                "the values of this input decide shapes; a profile over its values is not supported",
                where=f"input {name}",
                fix="make it a constant of the model",
            )
        if -1 in list(tensor.shape) and not all(name in sizes for sizes in profiles or [{}]):
            raise BuildError("the input has dynamic dimensions and no bounds", where=f"input {name}")
    for sizes in profiles:
        for name, (low, usual, high) in sizes.items():
            if name not in known:
                raise BuildError(f"the model has no input {name}", fix=f"its inputs are {', '.join(sorted(known))}")
            if not all(0 <= a <= b <= c for a, b, c in zip(low, usual, high, strict=True)):
                raise BuildError(
                    f"min {low}, opt {usual}, max {high} do not rise", where=f"input {name}", fix="min <= opt <= max"
                )


def _read_timing_caches(config: vendor.IBuilderConfig, files: dict[str, Any] | None, heard: Heard) -> list[str]:
    """Give the builder what earlier builds measured; the paths of those that it took.

    A cache of another version or GPU is left aside, not trusted: all are held against an empty one of this builder.
    """
    if files is None:
        return []
    known = config.create_timing_cache(b"")
    if known is None:
        return []
    used: list[str] = []
    for path in files["read"]:
        each = config.create_timing_cache(Path(path).read_bytes())
        if each is not None and known.combine(each, False):
            used.append(path)
        else:
            heard.add("WARNING", f"the timing cache {Path(path).name} was not accepted; tactics are measured anew")
    config.set_timing_cache(known, False)
    return used


def _write_timing_cache(config: vendor.IBuilderConfig, files: dict[str, Any] | None) -> None:
    if files is None:
        return
    cache = config.get_timing_cache()
    data = None if cache is None else cache.serialize()
    if data is not None:
        with Path(files["write"]).open("wb") as stream:
            stream.write(data)


def _tensor(tensor: vendor.ITensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": str(tensor.dtype).removeprefix("DataType."), "shape": list(tensor.shape)}
