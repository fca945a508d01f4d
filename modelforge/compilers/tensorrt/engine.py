"""An engine on the GPU, in a child process: loaded after its digest was checked, then executed.

TensorRT never raises: what is None or False here becomes an error that holds what it logged.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelforge.compilers.tensorrt.cuda import Driver, Gpu
from modelforge.compilers.tensorrt.messages import failure
from modelforge.compilers.tensorrt.product import parse_version
from modelforge.compilers.tensorrt.vendor import Heard, listen, load
from modelforge.errors import BuildError, IntegrityError, UnsupportedError

if TYPE_CHECKING:
    import tensorrt_rtx as vendor

    Array = np.ndarray[Any, Any]  # as it runs, NumPy 1.21, which JetPack 6 has, takes no subscripts

# NumPy has no bfloat16 and no FP8: engines with such inputs or outputs are not run here.
_DTYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


class Loaded:
    """An engine with its execution context, stream and buffers.

    Args:
        request: ``product`` and ``folder``: what to load, and from where; ``engine``: path; ``digest``:
            ``sha256:<hex>``; ``version``: of what built it; ``version_compatible``; ``sm``: of the GPU to run on;
            ``weights``: the ONNX model of a weight-stripped engine, or None; ``profiles``: as it was built with.

    Raises:
        IntegrityError: the file is not the one that was recorded, or was built by a version that this one cannot load.
        BuildError: there is no such GPU, or the engine gives no execution context.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        data = _checked_bytes(Path(request["engine"]), request["digest"])
        self._cuda = Driver()
        self.gpu = _choose_gpu(self._cuda, request["sm"])
        self._cuda.use(self.gpu)
        self._free_before = self._lowest_free = self._cuda.free_bytes()
        trt = load(request)
        _check_version(trt.__version__, request)
        self._trt = trt
        self._heard = Heard(needs_gpu=True)
        self._logger = listen(trt, self._heard)
        self._runtime = _new_runtime(trt, self._logger, self._heard)
        if request["version_compatible"]:
            # It carries the runtime of its version, which is host code. Its digest is the recorded one.
            self._runtime.engine_host_code_allowed = True
        self._engine = _deserialize(self._runtime, data, self._heard)
        if request["weights"]:
            _put_weights_in(trt, self._engine, self._logger, request["weights"], self._heard)
        self._context = _new_context(self._engine, self._heard)
        self._profiles: list[dict[str, list[list[int]]]] = request["profiles"]
        self._profile = 0
        self._stream = self._cuda.stream()
        self._events = [self._cuda.event() for _ in range(4)]
        self._buffers: dict[str, tuple[int, int]] = {}
        self._read_tensors()
        self._watch_memory()

    def _read_tensors(self) -> None:
        self.input_shapes: dict[str, tuple[int, ...]] = {}
        self.output_shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, Any] = {}
        engine: vendor.ICudaEngine = self._engine
        for index in range(engine.num_io_tensors):
            name: str = engine.get_tensor_name(index)
            dtype: str = engine.get_tensor_dtype(name).name
            if dtype not in _DTYPES:
                raise UnsupportedError(f"tensor {name} is {dtype}, which NumPy does not have: it is not run here")
            self._dtypes[name] = np.dtype(_DTYPES[dtype])
            is_input = engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            shapes = self.input_shapes if is_input else self.output_shapes
            shapes[name] = tuple(int(size) for size in engine.get_tensor_shape(name))

    @property
    def output_names(self) -> list[str]:
        return list(self.output_shapes)

    def smallest_batch(self) -> int:
        """The smallest first dimension that every dynamic input takes."""
        lows = [
            min(profile[name][0][0] for profile in self._profiles)
            for name, shape in self.input_shapes.items()
            if shape[:1] == (-1,) and self._profiles
        ]
        return max(lows, default=1)

    def peak_bytes(self) -> int:
        """Device memory that was taken while it ran, everything of this process included."""
        return max(0, self._free_before - self._lowest_free)

    def execute(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run one batch: inputs by name in, outputs by name out."""
        hosts = self._prepare(feeds)
        outputs = self._outputs()
        self._send(hosts)
        self._enqueue()
        self._fetch(outputs)
        self._cuda.wait(self._stream)
        self._watch_memory()
        return outputs

    def timed(self, feeds: dict[str, Array]) -> dict[str, float]:
        """Milliseconds of one batch by CUDA events: ``in`` (host to device), ``compute``, ``out``."""
        hosts = self._prepare(feeds)
        outputs = self._outputs()
        marks = self._events
        self._cuda.record(marks[0], self._stream)
        self._send(hosts)
        self._cuda.record(marks[1], self._stream)
        self._enqueue()
        self._cuda.record(marks[2], self._stream)
        self._fetch(outputs)
        self._cuda.record(marks[3], self._stream)
        self._cuda.wait(self._stream)
        self._watch_memory()
        names = ("in", "compute", "out")
        return {name: self._cuda.milliseconds(marks[at], marks[at + 1]) for at, name in enumerate(names)}

    def layer_times(self, feeds: dict[str, Array]) -> list[dict[str, Any]]:
        """The time of each layer in one run, in the order of execution. Slower than a run without, so done last."""
        hosts = self._prepare(feeds)
        layers: list[dict[str, Any]] = []
        self._profiler = _profiler(self._trt, layers)  # TensorRT only borrows it
        context: vendor.IExecutionContext = self._context
        context.profiler = self._profiler
        self._send(hosts)
        self._enqueue()
        self._cuda.wait(self._stream)
        return layers

    def _prepare(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Shapes and device memory for one batch; the inputs as the engine wants them."""
        hosts = {name: self._as_wanted(name, array) for name, array in feeds.items()}
        shapes = {name: list(array.shape) for name, array in hosts.items()}
        self._choose_profile(shapes)
        context: vendor.IExecutionContext = self._context
        for name, array in hosts.items():
            if not context.set_input_shape(name, tuple(array.shape)):
                raise failure(self._heard.errors(), f"input {name} does not take shape {list(array.shape)}")
            self._place(name, array.nbytes)
        return hosts

    def _outputs(self) -> dict[str, Array]:
        """Room for the outputs, here and on the device."""
        context: vendor.IExecutionContext = self._context
        outputs: dict[str, Array] = {}
        for name in self.output_names:
            shape = tuple(int(size) for size in context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise UnsupportedError(
                    f"the shape of output {name} depends on the values of the input",
                    fix="give an output of fixed size, for example with the last steps of detection left to the client",
                )
            outputs[name] = np.empty(shape, self._dtypes[name])
            self._place(name, outputs[name].nbytes)
        return outputs

    def _as_wanted(self, name: str, array: Array) -> Array:
        wanted = self._dtypes[name]
        if array.dtype != wanted and not (array.dtype.kind == wanted.kind == "f"):
            raise BuildError(f"input {name} is {array.dtype}, the engine takes {wanted}", where=f"input {name}")
        return np.ascontiguousarray(array, wanted)

    def _choose_profile(self, shapes: dict[str, list[int]]) -> None:
        """The first profile whose ranges hold all the shapes."""
        if not self._profiles:
            return
        fitting = [place for place, profile in enumerate(self._profiles) if _fits(profile, shapes)]
        if not fitting:
            told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise BuildError(f"no optimisation profile of the engine takes {told}", fix="stay within [dims]")
        if fitting[0] != self._profile:
            context: vendor.IExecutionContext = self._context
            if not context.set_optimization_profile_async(fitting[0], self._stream):
                raise failure(self._heard.errors(), f"profile {fitting[0]} was not taken")
            self._cuda.wait(self._stream)
            self._profile = fitting[0]

    def _place(self, name: str, size: int) -> None:
        """Device memory for a tensor; kept, and only ever grown."""
        address, room = self._buffers.get(name, (0, -1))
        if room < size:
            if address:
                self._cuda.release(address)
            address = self._cuda.allocate(size)
            self._buffers[name] = (address, size)
        context: vendor.IExecutionContext = self._context
        if not context.set_tensor_address(name, address):
            raise failure(self._heard.errors(), f"tensor {name} took no address")

    def _send(self, hosts: dict[str, Array]) -> None:
        for name, array in hosts.items():
            self._cuda.to_device(self._buffers[name][0], array.ctypes.data, array.nbytes, self._stream)

    def _fetch(self, outputs: dict[str, Array]) -> None:
        for name, array in outputs.items():
            self._cuda.to_host(array.ctypes.data, self._buffers[name][0], array.nbytes, self._stream)

    def _enqueue(self) -> None:
        context: vendor.IExecutionContext = self._context
        if not context.execute_async_v3(self._stream):
            raise failure(self._heard.errors(), "the engine did not run")

    def _watch_memory(self) -> None:
        self._lowest_free = min(self._lowest_free, self._cuda.free_bytes())


def _checked_bytes(path: Path, digest: str) -> bytes:
    """The engine, read once: what is hashed is what is loaded."""
    data = path.read_bytes()
    found = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if found != digest:
        raise IntegrityError(
            f"the engine is not the one that was built: its digest is {found}, not {digest}; it was not loaded",
            where=path.name,
            fix="get it again from where it came, or build it again",
        )
    return data


def _choose_gpu(cuda: Driver, sm: int) -> Gpu:
    found = [gpu for gpu in cuda.gpus() if gpu.sm == sm]
    if not found:
        raise BuildError(f"there is no GPU of compute capability {sm // 10}.{sm % 10} here")
    return found[0]


def _check_version(here: str, request: dict[str, Any]) -> None:
    """An engine belongs to the exact version that built it, unless it was built to outlive it: then to newer ones."""
    built, installed = parse_version(request["version"]), parse_version(here)
    length = min(len(built), len(installed))
    built, installed = built[:length], installed[:length]
    if not (installed == built or (request["version_compatible"] and installed > built)):
        raise IntegrityError(
            f"the engine was built by version {request['version']}, and {here} is installed; it was not loaded",
            where=Path(request["engine"]).name,
            fix=f"install version {request['version']}, or build the variant again",
        )


def _new_runtime(trt: Any, logger: vendor.ILogger, heard: Heard) -> vendor.Runtime:
    try:
        runtime: vendor.Runtime = trt.Runtime(logger)
    except TypeError as error:  # pybind11's word for a factory that gave nothing
        raise failure(heard.errors(), f"there is no runtime: {error}") from error
    return runtime


def _deserialize(runtime: vendor.Runtime, data: bytes, heard: Heard) -> vendor.ICudaEngine:
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise failure(heard.errors(), "the engine was not loaded")
    return engine


def _put_weights_in(trt: Any, engine: vendor.ICudaEngine, logger: vendor.ILogger, model: str, heard: Heard) -> None:
    """Give a weight-stripped engine its weights, from the ONNX model that it was built from."""
    refitter: vendor.Refitter = trt.Refitter(engine, logger)
    parser: vendor.OnnxParserRefitter = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(model) or not refitter.refit_cuda_engine():
        raise failure(heard.errors(), "the weights could not be put into the engine")


def _new_context(engine: vendor.ICudaEngine, heard: Heard) -> vendor.IExecutionContext:
    context = engine.create_execution_context()
    if context is None:
        raise failure(heard.errors(), "the engine gave no execution context")
    return context


def _profiler(trt: Any, layers: list[dict[str, Any]]) -> vendor.IProfiler:
    class Profiler(trt.IProfiler):  # type: ignore[misc]  # the vendor package has no types
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            layers.append({"name": layer_name, "ms": ms})

    return Profiler()


def _fits(profile: dict[str, list[list[int]]], shapes: dict[str, list[int]]) -> bool:
    return all(
        len(shape) == len(profile[name][0])
        and all(low <= size <= high for low, size, high in zip(profile[name][0], shape, profile[name][2], strict=True))
        for name, shape in shapes.items()
        if name in profile
    )
