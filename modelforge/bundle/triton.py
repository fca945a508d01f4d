"""Triton Inference Server's model repository: what of a bundle it can serve, and the ``config.pbtxt`` for it.

Format: model_config.proto and docs/user_guide/{model_repository,model_configuration}.md of triton-inference-server.
Writes no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from modelforge.bundle.batching import Batching, Curve, curve_of, latency_budget, recommend, sizes_of
from modelforge.bundle.format import title_fault
from modelforge.bundle.links import Tensor, stage_tensors
from modelforge.bundle.match import profile_of
from modelforge.bundle.read import Bundle, Variant
from modelforge.bundle.record import VariantRecord
from modelforge.errors import InputError, UnsupportedError

Tensors = Sequence[Tensor]

_DTYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
    "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64", "string": "TYPE_STRING",
    "bfloat16": "TYPE_BF16",
}  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """One of Triton's own backends: its name, the platform word, the file name that it looks for."""

    name: str
    platform: str
    model_file: str


ONNX_RUNTIME = Backend("onnxruntime", "onnxruntime_onnx", "model.onnx")

# Compiler -> the stock backend that loads its artifacts (triton-inference-server/backend, README.md).
_BACKENDS = {"onnxruntime": ONNX_RUNTIME, "tensorrt": Backend("tensorrt", "tensorrt_plan", "model.plan")}

_WHY_NOT = {
    "tensorrt-rtx": "Triton's TensorRT backend loads plans of classic TensorRT, not engines of TensorRT-RTX",
    "tvm": "stock Triton has no backend for TVM libraries",
}

# Compiler -> precisions at which its lowered model holds operators that ONNX Runtime does not have.
_FOREIGN_OPERATORS = {"ascend": ("int8", "mixed")}

_KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}


@dataclass(frozen=True)
class Served:
    """One model of the repository.

    Attributes:
        name: of its folder.
        files: name in the version folder by title in the bundle.
        config: the text of ``config.pbtxt``.
        notes: what whoever serves it must know.
    """

    variant: Variant
    name: str
    files: Mapping[str, str]
    config: str
    batching: Batching | None
    notes: tuple[str, ...]


def serve(bundle: Bundle, variant: Variant, *, lowered: bool = False) -> Served:
    """How Triton can serve a variant.

    Args:
        lowered: serve the lowered ONNX model with ONNX Runtime, instead of the artifact.

    Raises:
        UnsupportedError: no stock backend of Triton can.
        InputError: the stage's name cannot name a folder; two files would have one name.
    """
    record = variant.record
    if reason := unserved(variant, lowered=lowered):
        way = _has_lowered_for_onnx_runtime(variant) and not lowered
        raise UnsupportedError(
            f"cannot be served by Triton: {reason}",
            where=f"target {record.target}",
            fix="--lowered exports its lowered model for ONNX Runtime" if way else "choose another --target",
        )
    backend = ONNX_RUNTIME if lowered else _BACKENDS[str(record.compiler)]
    main = _lowered_model(variant) if lowered else record.artifact.file if record.artifact is not None else None
    name = bundle.name if record.stage == "main" else f"{bundle.name}-{record.stage}"
    if main is None or (fault := title_fault(name)):
        raise InputError(f'the stage "{record.stage}" cannot name a folder: it {fault}', where=str(bundle.path))
    # External data keeps its name: the model refers to it by that.
    files = {title: backend.model_file if title == main else title for title in _with_data(variant, main)}
    sizes = sizes_of(record)
    # The recorded times are those of the artifact in its own runtime.
    batching = recommend(Curve({}, "none") if lowered else curve_of(record), sizes, latency_budget(bundle.about))
    config, notes = _config(bundle, variant, backend, name, batching)
    if lowered:
        notes.append(
            "the lowered model in ONNX Runtime, not the artifact: the recorded latency is not that of this one"
        )
    elif record.runtime is not None:
        notes.append(f"the server must have: {record.runtime.requires}")
    return Served(variant, name, files, config, batching, tuple(notes))


def unserved(variant: Variant, *, lowered: bool = False) -> str:
    """Why no stock backend of Triton serves a variant; empty where one does."""
    record = variant.record
    if lowered:
        if _lowered_model(variant) is None:
            return "it carries no lowered ONNX model"
        if not _has_lowered_for_onnx_runtime(variant):
            return f"its {record.precision} model holds operators of {record.compiler} that ONNX Runtime does not have"
        return ""
    if record.status != "compiled":
        return f"it is {record.status}"
    if record.compiler in _BACKENDS:
        return ""
    return _WHY_NOT.get(str(record.compiler), f"no stock backend of Triton loads what {record.compiler} compiles")


def _has_lowered_for_onnx_runtime(variant: Variant) -> bool:
    foreign = _FOREIGN_OPERATORS.get(str(variant.record.compiler), ())
    return _lowered_model(variant) is not None and variant.record.precision not in foreign


def _lowered_model(variant: Variant) -> str | None:
    """The title of the lowered model of the record's precision; those of other rungs have a prefix."""
    titles = [title for title, entry in variant.files.items() if entry.role == "lowered-model"]
    models = [title for title in titles if title.endswith(".onnx")]
    return "model.onnx" if "model.onnx" in models else models[0] if len(models) == 1 else None


def _with_data(variant: Variant, main: str) -> list[str]:
    """A model's file and its external data, which has its name with an ending."""
    return [title for title in variant.files if title == main or title.startswith(f"{main}.")]


# -- config.pbtxt


def _config(
    bundle: Bundle, variant: Variant, backend: Backend, name: str, batching: Batching | None
) -> tuple[str, list[str]]:
    """The text, and what to know of it."""
    record = variant.record
    notes: list[str] = []
    tensors = stage_tensors(bundle.about, record.stage)
    fault = "the bundle does not tell the model's tensors" if tensors is None else _tensor_fault(*tensors)
    is_batched = tensors is not None and not fault and batching is not None and _is_batched(*tensors, notes)
    lines = [
        f"# {bundle.name} {bundle.version}, target {record.target}, {record.precision}",
        f"# bundle {bundle.digest}",
        f"name: {quoted(name)}",
        f"platform: {quoted(backend.platform)}",
        f"backend: {quoted(backend.name)}",
        f"max_batch_size: {batching.max_batch if is_batched and batching is not None else 0}",
    ]
    if tensors is None or fault:
        # Triton completes the tensors of ONNX models and TensorRT plans from the files themselves.
        notes.append(f"the inputs and outputs are left for Triton to complete: {fault}")
    else:
        for kind, group in zip(("input", "output"), tensors, strict=True):
            for tensor in group:
                lines += _tensor(kind, tensor, skip_first=is_batched)
    if is_batched and batching is not None and batching.max_batch > 1:
        lines += _dynamic_batching(batching)
    kind = _KINDS.get(
        str((profile_of(bundle.about, record.target, stage=record.stage).arch or {}).get("kind")), "KIND_AUTO"
    )
    lines += ["instance_group [", f"  {{ count: 1 kind: {kind} }}", "]", ""]
    return "\n".join(lines), notes


def _dynamic_batching(batching: Batching) -> Iterator[str]:
    told = "not measured" if batching.source == "none" else batching.source
    preferred = ", ".join(str(size) for size in batching.preferred if size > 1)
    yield f"# batch sizes and delay: {told}"
    yield "dynamic_batching {"
    yield f"  preferred_batch_size: [ {preferred} ]"
    yield f"  max_queue_delay_microseconds: {batching.max_queue_delay_us}"
    yield "}"


def _tensor(kind: str, tensor: Tensor, *, skip_first: bool) -> Iterator[str]:
    """``dims`` without the batch; an empty shape is written as one element that Triton reshapes to none."""
    shape = (tensor.shape or ())[1 if skip_first else 0 :]
    dims = ", ".join(str(part) if isinstance(part, int) else "-1" for part in shape)
    yield f"{kind} ["
    yield "  {"
    yield f"    name: {quoted(tensor.name)}"
    yield f"    data_type: {_DTYPES[tensor.dtype]}"
    yield f"    dims: [ {dims or 1} ]"
    if not shape:
        yield "    reshape: { shape: [ ] }"
    yield "  }"
    yield "]"


def _tensor_fault(inputs: Tensors, outputs: Tensors) -> str:
    """Why the tensors cannot be written down; empty where they can."""
    for tensor in (*inputs, *outputs):
        if tensor.shape is None:
            return f"the shape of {tensor.name} is not recorded"
        if tensor.dtype not in _DTYPES:
            return f"Triton has no type for {tensor.name}, of {tensor.dtype}"
    return ""


def _is_batched(inputs: Tensors, outputs: Tensors, notes: list[str]) -> bool:
    """Whether the first dimension of every tensor is the batch, as ``max_batch_size`` above 0 asks for."""
    firsts = {tensor.shape[0] if tensor.shape else None for tensor in inputs}
    if len(firsts) != 1 or not isinstance(symbol := firsts.pop(), str):
        return False
    for tensor in outputs:
        first = tensor.shape[0] if tensor.shape else None
        if first == "?":
            notes.append(f"the first dimension of the output {tensor.name} is taken to be the batch")
        elif first != symbol:
            notes.append(f"no batching by Triton: the first dimension of the output {tensor.name} is not the batch")
            return False
    return True


def quoted(text: str) -> str:
    """A string of protobuf's text format: ASCII, all else as octal escapes of its UTF-8 bytes."""
    safe = (chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(safe)}"'


def servable(bundle: Bundle, *, lowered: bool = False) -> list[VariantRecord]:
    """Records of the variants that Triton can serve."""
    return [variant.record for variant in bundle.variants if not unserved(variant, lowered=lowered)]
