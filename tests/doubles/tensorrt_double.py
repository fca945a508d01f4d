"""A double of the module `tensorrt`: what the real bindings of one version have, and no more. Not TensorRT.

Installed into a folder by :mod:`tests.doubles.install_tensorrt`, with ``api.json`` (recorded from the real bindings)
and ``behaviour.json`` (what should go wrong) beside it. Its "engines" are a header and the ONNX model; they are
executed by ONNX Runtime on host memory. Its version ends in ``+double``, and so says every record made with it.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import json
import os
import re
import struct
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

_HERE = Path(__file__).parent
_API = json.loads((_HERE / "api.json").read_text())
_BEHAVIOUR = json.loads((_HERE / "behaviour.json").read_text())
_NUMBERS = tuple(int(each) for each in _API["version"].split("."))
__version__ = _API["version"] + "+double"


def _accepts(signature, arguments, keywords):
    inside = signature[signature.index("(") + 1 : signature.rindex(")", 0, signature.rindex(" -> "))]
    inside = re.sub(r"\[[^]]*\]|<[^>]*>", "", inside)
    parameters = [each.strip() for each in inside.split(",")][1:]
    names = [re.split("[:=]", each)[0].strip() for each in parameters]
    required = {name for name, each in zip(names, parameters, strict=True) if "=" not in each}
    given = {*names[: len(arguments)], *keywords}
    return len(arguments) <= len(names) and set(keywords) <= set(names) and required <= given


def _checked(name, signatures, function):
    @functools.wraps(function)
    def call(self, *arguments, **keywords):
        if not any(_accepts(each, arguments, keywords) for each in signatures):
            raise TypeError(f"{name}(): incompatible function arguments. Supported: {signatures}")
        return function(self, *arguments, **keywords)

    return call


class _Recorded:
    """Has the public attributes that the real class has: others cannot be read, set, or called in another way."""

    def __init_subclass__(cls, **more):
        super().__init_subclass__(**more)
        known = _API["classes"].get(cls.__name__)
        if known is None or cls.__module__ != __name__:
            return
        for name, value in list(vars(cls).items()):
            if name.startswith("_") and name != "__init__":
                continue
            recorded = known["attributes"].get(name)
            if recorded is None:
                delattr(cls, name)  # this version does not have it
            elif callable(value) and recorded:
                setattr(cls, name, _checked(f"{cls.__name__}.{name}", recorded, value))

    def __setattr__(self, name, value):
        kind = next(each for each in type(self).__mro__ if each.__module__ == __name__)
        if not name.startswith("_") and name not in _API["classes"][kind.__name__]["attributes"]:
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)


def _enum(name):
    return enum.IntEnum(name, _API["classes"][name]["enum"], start=0)


BuilderFlag, DataType, DeviceType, ErrorCode = map(_enum, ("BuilderFlag", "DataType", "DeviceType", "ErrorCode"))
HardwareCompatibilityLevel, MemoryPoolType = _enum("HardwareCompatibilityLevel"), _enum("MemoryPoolType")
NetworkDefinitionCreationFlag, TensorIOMode = _enum("NetworkDefinitionCreationFlag"), _enum("TensorIOMode")
_Severity = _enum("Severity")


class ILogger(_Recorded):
    Severity = _Severity
    VERBOSE, INFO, WARNING = _Severity.VERBOSE, _Severity.INFO, _Severity.WARNING
    ERROR, INTERNAL_ERROR = _Severity.ERROR, _Severity.INTERNAL_ERROR

    def __init__(self):
        pass

    def log(self, severity, msg):
        raise NotImplementedError


class IProfiler(_Recorded):
    def __init__(self):
        pass

    def report_layer_time(self, layer_name, ms):
        raise NotImplementedError


def _need_gpu(logger):
    """As the real ones: without a driver there is no builder and no runtime."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        logger.log(_Severity.ERROR, "CUDA initialization failure with error: 35. Please check your CUDA installation")
        raise TypeError("pybind11::init(): factory function returned nullptr") from None


class ITensor(_Recorded):
    def __init__(self, value=None):
        self.name = value.name
        self.dtype = _dtype(value.type.tensor_type.elem_type)
        dims = value.type.tensor_type.shape.dim
        self._symbols = tuple(each.dim_param or each.dim_value for each in dims)
        self.shape = tuple(-1 if each.dim_param else each.dim_value for each in dims)
        self.is_shape_tensor = False


_DTYPES = {1: "FLOAT", 10: "HALF", 7: "INT64", 6: "INT32", 3: "INT8", 2: "UINT8", 9: "BOOL", 16: "BF16"}


def _dtype(element):
    return DataType[_DTYPES[element]]


class ILayer(_Recorded):
    def __init__(self, node=None):
        self.name = node.name or node.output[0]
        self._op = node.op_type


class INetworkDefinition(_Recorded):
    def __init__(self, flags=0):
        self._model = None
        self.num_layers = self.num_inputs = self.num_outputs = 0

    def _take(self, model):
        self._model = model
        held = {each.name for each in model.graph.initializer}
        self._inputs = [each for each in model.graph.input if each.name not in held]
        self.num_layers, self.num_inputs = len(model.graph.node), len(self._inputs)
        self.num_outputs = len(model.graph.output)

    def get_layer(self, index):
        return ILayer(self._model.graph.node[index])

    def get_input(self, index):
        return ITensor(self._inputs[index])

    def get_output(self, index):
        return ITensor(self._model.graph.output[index])


class ParserError(_Recorded):
    def __init__(self, code="", operator="", node=""):
        self._code, self._operator, self._node = code, operator, node

    def code(self):
        return ErrorCode[self._code]

    def desc(self):
        return "false"  # what the real ones say of an operator that they do not have

    def node(self):
        return 0

    def node_name(self):
        return self._node

    def node_operator(self):
        return self._operator


class OnnxParser(_Recorded):
    def __init__(self, network, logger):
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index):
        return self._errors[index]

    def supports_operator(self, op_name):
        return op_name != "Unique"

    def parse_from_file(self, model):
        try:
            loaded = onnx.load(model)
        except Exception:  # a file of garbage parses "well", to nothing
            return True
        node = next((each for each in loaded.graph.node if each.op_type == _BEHAVIOUR.get("refuse")), None)
        if node is not None:
            self._errors.append(ParserError("UNSUPPORTED_NODE", node.op_type, node.name))
            return False
        self._network._take(onnx.shape_inference.infer_shapes(loaded, data_prop=True))
        return True


class IOptimizationProfile(_Recorded):
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        self._shapes[input] = [list(min), list(opt), list(max)]


_TIMED = f"timing {__version__}"
"""What the double's timing caches begin with, as the real ones' header; then words, each a thing that was measured."""


class ITimingCache(_Recorded):
    def __init__(self, data=b""):
        self._words = set(data.decode().removeprefix(_TIMED).split())
        self._fits = not data or data.startswith(_TIMED.encode())

    def serialize(self):
        return " ".join([_TIMED, *sorted(self._words)]).encode()

    def combine(self, input_cache, ignore_mismatch):
        if not input_cache._fits:
            return False
        self._words |= input_cache._words
        return True


class IBuilderConfig(_Recorded):
    def __init__(self):
        self._flags, self._pools, self._profiles, self._cache = set(), {}, [], None
        self.default_device_type, self.DLA_core = DeviceType.GPU, -1
        self.builder_optimization_level = 3
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    def set_flag(self, flag):
        self._flags.add(flag.name)

    def set_memory_pool_limit(self, pool, pool_size):
        self._pools[pool.name] = pool_size

    def add_optimization_profile(self, profile):
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    def can_run_on_DLA(self, layer):  # noqa: N802  # the real name
        return layer._op in ("Conv", "Relu", "MaxPool", "AveragePool", "Add")

    def create_timing_cache(self, serialized_timing_cache):
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return cache._fits

    def get_timing_cache(self):
        return self._cache


class Builder(_Recorded):
    def __init__(self, logger):
        _need_gpu(logger)
        self._logger = logger
        self.num_DLA_cores = _BEHAVIOUR.get("dla_cores", 0)

    def create_network(self, flags=0):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        told = _BEHAVIOUR.get("build")
        if told == "hang":
            time.sleep(3600)
        if told == "crash":
            os.abort()
        if told:
            self._logger.log(_Severity.ERROR, told)
            return None
        self._logger.log(_Severity.WARNING, "this is a double: nothing was optimised")
        if config._cache is not None:
            config._cache._words.add(_BEHAVIOUR.get("measured", "convolution"))
        facts = {"profiles": config._profiles, "flags": sorted(config._flags)}
        model = b"" if "STRIP_PLAN" in config._flags else network._model.SerializeToString()
        return _pack(facts, model)


def _pack(facts, model):
    about = json.dumps(facts).encode()
    body = struct.pack("<I", len(about)) + about + model
    size = 64 + len(body)
    version = bytes((*_NUMBERS, 26)[:4])
    return (b"ftrt" + struct.pack("<IQQ", 0, 2, size) + version).ljust(64, b"\0") + body


class ICudaEngine(_Recorded):
    def __init__(self, data=b""):
        (length,) = struct.unpack_from("<I", data, 64)
        self._facts = json.loads(data[68 : 68 + length])
        self._model = None
        if data[68 + length :]:
            self._give(onnx.load_model_from_string(data[68 + length :]))

    def _give(self, model):
        self._model = model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        held = {each.name for each in model.graph.initializer}
        self._inputs = {each.name: ITensor(each) for each in model.graph.input if each.name not in held}
        self._outputs = {each.name: ITensor(each) for each in model.graph.output}
        self._all = {**self._inputs, **self._outputs}
        self.num_io_tensors = len(self._all)

    def get_tensor_name(self, index):
        return list(self._all)[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return self._all[name].dtype

    def get_tensor_shape(self, name):
        return self._all[name].shape

    def create_execution_context(self, strategy=None):
        return None if _BEHAVIOUR.get("context") == "none" or self._model is None else IExecutionContext(self)


class Refitter(_Recorded):
    def __init__(self, engine, logger):
        self._engine, self._model = engine, None

    def refit_cuda_engine(self):
        self._engine._give(self._model)
        return True


class OnnxParserRefitter(_Recorded):
    def __init__(self, refitter, logger):
        self._refitter = refitter

    def refit_from_file(self, model):
        self._refitter._model = onnx.load(model)
        return _BEHAVIOUR.get("refit") != "fail"


class Runtime(_Recorded):
    def __init__(self, logger):
        _need_gpu(logger)
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine):
        (_HERE / "deserialized").write_text("yes")  # tests look whether it came to this
        told = _BEHAVIOUR.get("deserialize")
        if told:
            self._logger.log(_Severity.ERROR, told)
            return None
        return ICudaEngine(bytes(serialized_engine))


class IExecutionContext(_Recorded):
    def __init__(self, engine=None):
        self._engine, self._shapes, self._addresses = engine, {}, {}
        model = engine._model.SerializeToString()
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._profile = 0
        self.profiler = None

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self._profile = profile_index
        return bool(stream_handle)

    def set_input_shape(self, name, shape):
        profiles = self._engine._facts["profiles"]
        if profiles:
            low, _, high = profiles[self._profile][name]
            if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        known = {}
        for given, shape in self._shapes.items():
            known |= dict(zip(self._engine._all[given]._symbols, shape, strict=True))
        symbols = self._engine._all[name]._symbols
        return tuple(known.get(each, -1) if isinstance(each, str) else each for each in symbols)

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return memory % 16 == 0

    def execute_async_v3(self, stream_handle):
        if _BEHAVIOUR.get("execute") == "fail" or not stream_handle:
            return False
        feeds = {name: self._read(name, shape) for name, shape in self._shapes.items()}
        begun = time.perf_counter()
        results = self._session.run(list(self._engine._outputs), feeds)
        if self.profiler is not None:
            self.profiler.report_layer_time("the whole model, by the double", (time.perf_counter() - begun) * 1e3)
        for name, value in zip(self._engine._outputs, results, strict=True):
            wrong = {"zeros": 0, "scaled": 3}.get(_BEHAVIOUR.get("outputs"), 1)
            data = np.ascontiguousarray(value * np.asarray(wrong, value.dtype))
            ctypes.memmove(self._addresses[name], data.ctypes.data, data.nbytes)
        return True

    def _read(self, name, shape):
        kinds = {"FLOAT": "f4", "HALF": "f2", "INT64": "i8", "INT32": "i4", "INT8": "i1", "UINT8": "u1", "BOOL": "?"}
        dtype = np.dtype(kinds[self._engine._inputs[name].dtype.name])
        count = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(ctypes.string_at(self._addresses[name], count), dtype).reshape(shape)
