"""Write the stages of a planned split as ONNX files. Weights in external data are streamed: memory stays bounded.

Every stage is a model of its own, with its own copy of the weights that it needs; holes of a sparse file stay holes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from modelforge.errors import InputError, ModelError
from modelforge.graph.load import check_model, parse
from modelforge.graph.split_graph import captures, inlined
from modelforge.graph.split_plan import CutTensor, SplitPlan, StagePlan
from modelforge.graph.walk import tensors
from modelforge.store import write_atomically

MANIFEST = "split.json"
SCHEMA = 1
_CHUNK = 1 << 26
_ALIGNMENT = 4096
"""ONNX external data: offsets on page boundaries can be mapped (onnx/onnx.proto, TensorProto.external_data)."""


@dataclass(frozen=True)
class Stages:
    """What was written: one model file a stage, in order, and the manifest."""

    folder: Path
    files: tuple[Path, ...]
    manifest: Path


def write_split(model: Path, plan: SplitPlan, folder: Path, judge: Callable[[Path], None] | None = None) -> Stages:
    """Write ``folder`` with one ONNX file a stage and ``split.json``. It appears whole, or not at all.

    Args:
        model: the file that the plan was made from.
        folder: must not exist, or be empty, or hold an earlier split, which is replaced.
        judge: looks at the files before they get their place; what it raises leaves nothing behind.

    Raises:
        InputError: the folder holds something else, or cannot be written.
        ModelError: the model is not the one that was planned.
    """
    model, folder = Path(model), Path(folder)
    _check_folder(folder)
    work = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".split-"))
        work.chmod(0o755)
        write_files(model, plan, work)
        if judge is not None:
            judge(work)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(work, folder)
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise InputError(what, where=str(folder), fix="give another -o DIR") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    files = tuple(folder / stage.file for stage in plan.stages)
    return Stages(folder, files, folder / MANIFEST)


def write_files(model: Path, plan: SplitPlan, folder: Path) -> Stages:
    """As :func:`write_split`, into a folder that exists and is private to the caller."""
    whole = inlined(parse(model))
    if plan.stages and max(max(stage.nodes) for stage in plan.stages) >= len(whole.graph.node):
        raise ModelError("the model is not the one that was planned", where=str(model), fix="plan it again")
    for stage in plan.stages:
        _write_stage(whole, model, stage, set(plan.shapes), folder)
    manifest = folder / MANIFEST
    write_atomically(manifest, json.dumps(describe(plan), indent=2, ensure_ascii=False).encode())
    manifest.chmod(0o644)
    return Stages(folder, tuple(folder / stage.file for stage in plan.stages), manifest)


def stage_models(model: Path, plan: SplitPlan) -> list[onnx.ModelProto]:
    """The stages in memory, to look at and not to run: external data stays where it is."""
    whole = inlined(parse(Path(model)))
    return [_stage_model(whole, stage, set(plan.shapes)) for stage in plan.stages]


def describe(plan: SplitPlan) -> dict[str, Any]:
    """The stage manifest, for schedulers: which stage takes and gives which tensors, in which order."""
    return {
        "schema": SCHEMA,
        "method": plan.method,
        "inputs": list(plan.inputs),
        "outputs": [{"name": name, "from": source} for name, source in plan.outputs],
        "sizes": dict(plan.sizes),
        "stages": [
            {
                "name": stage.name,
                "file": stage.file,
                "inputs": [_tensor(each) for each in stage.inputs],
                "outputs": [_tensor(each) for each in stage.outputs],
                "layers": stage.layers,
                "flops": stage.flops,
                "weight_bytes": stage.weight_bytes,
                "activation_bytes": stage.activation_bytes,
                "seconds": stage.seconds,
            }
            for stage in plan.stages
        ],
        "duplicated": dict(plan.duplicated),
        "notes": list(plan.notes),
    }


def _tensor(tensor: CutTensor) -> dict[str, Any]:
    facts = asdict(tensor)
    source, readers, is_output = facts.pop("source"), facts.pop("readers"), facts.pop("is_output")
    return {**facts, "from": source, "to": list(readers), "is_output": is_output}


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError("this is a file, not a folder", where=str(folder), fix="give another -o DIR")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise InputError(
            "the folder holds something that is not a split", where=str(folder), fix="give a new or empty -o DIR"
        )


def _write_stage(whole: onnx.ModelProto, source: Path, stage: StagePlan, reshaped: set[str], folder: Path) -> None:
    path = folder / stage.file
    model = _stage_model(whole, stage, reshaped)
    external = [tensor for tensor in tensors(model) if tensor.data_location == TensorProto.EXTERNAL]
    if external:
        data = path.with_name(f"{path.name}.data")
        with data.open("wb", buffering=0) as out:
            end = 0
            for tensor in external:
                end = _copy_data(tensor, source, out, -(-end // _ALIGNMENT) * _ALIGNMENT)
            os.fsync(out.fileno())
    write_atomically(path, model.SerializeToString(deterministic=True))
    path.chmod(0o644)
    check_model(path)


def _stage_model(whole: onnx.ModelProto, stage: StagePlan, reshaped: set[str]) -> onnx.ModelProto:
    graph = whole.graph
    model = onnx.ModelProto(
        # Before version 4 an initializer had to be an input too.
        ir_version=max(whole.ir_version, 4),
        producer_name=whole.producer_name,
        producer_version=whole.producer_version,
        domain=whole.domain,
        model_version=whole.model_version,
    )
    model.opset_import.extend(whole.opset_import)
    model.functions.extend(whole.functions)
    model.metadata_props.extend(whole.metadata_props)
    part = model.graph
    part.name = f"{graph.name or 'graph'}_{stage.name}"
    part.node.extend(graph.node[index] for index in stage.nodes)
    known = {value.name: value.array() for value in stage.known}
    read = {name for node in part.node for name in captures(node)} | {tensor.name for tensor in stage.outputs}
    part.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    part.sparse_initializer.extend(sparse for sparse in graph.sparse_initializer if sparse.values.name in read)
    part.initializer.extend(numpy_helper.from_array(array, name) for name, array in known.items())
    # What the model says of its outputs and of tensors inside holds for its own input shapes.
    stated = (*graph.input, *(() if reshaped else (*graph.output, *graph.value_info)))
    declared = {value.name: value for value in stated if value.name not in reshaped}
    part.input.extend(_value(tensor, declared) for tensor in stage.inputs)
    part.output.extend(_value(tensor, declared) for tensor in stage.outputs)
    own = {name for node in part.node for name in node.output} - {tensor.name for tensor in stage.outputs}
    part.value_info.extend(value for value in graph.value_info if value.name in own and value.name in declared)
    names = own | {value.name for value in (*part.input, *part.output, *part.initializer)}
    part.quantization_annotation.extend(each for each in graph.quantization_annotation if each.tensor_name in names)
    return model


def _value(tensor: CutTensor, declared: Mapping[str, onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    """As the model declares it where it does; a tensor between stages as shape inference found it."""
    if (tensor.source == "input" or tensor.is_output) and tensor.name in declared:
        return declared[tensor.name]
    shape = None if tensor.shape is None else [None if size == "?" else size for size in tensor.shape]
    elem_type = (
        TensorProto.STRING if tensor.dtype == "string" else helper.np_dtype_to_tensor_dtype(_numpy(tensor.dtype))
    )
    return helper.make_tensor_value_info(tensor.name, elem_type, shape)


def _numpy(name: str) -> Any:
    """The dtype of that name; bfloat16 and the narrow floats are ml_dtypes', which onnx registers."""
    import ml_dtypes
    import numpy as np

    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def _copy_data(tensor: TensorProto, source: Path, out: FileIO, start: int) -> int:
    """Copy one tensor's external data to ``start`` of ``out``, and point the tensor there; gives where it ends."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    origin = source.parent / entries["location"]
    offset = int(entries.get("offset") or 0)
    length = int(entries.get("length") or 0) or origin.stat().st_size - offset
    if origin.stat().st_size < offset + length:  # a file system takes what lies behind its end for a hole
        raise ModelError(
            f"the external data of {tensor.name!r} ends before byte {offset + length}",
            where=str(origin),
            fix="export the model again, or copy it again: the file may have been cut short",
        )
    with origin.open("rb", buffering=0) as stream:
        for begin, end in _extents(stream.fileno(), offset, offset + length):
            out.seek(start + begin - offset)
            while begin < end:
                # Inside the kernel: the bytes never pass through this process.
                sent = os.sendfile(out.fileno(), stream.fileno(), begin, min(_CHUNK, end - begin))
                if sent == 0:
                    raise ModelError("the external data ends too early", where=str(origin))
                begin += sent  # noqa: PLW2901 - the rest of this stretch
    out.truncate(start + length)
    del tensor.external_data[:]
    for key, value in (("location", Path(out.name).name), ("offset", str(start)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return start + length


def _extents(file: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a file between two offsets that hold data; all of it where the file system does not say."""
    while begin < end:
        try:
            data = os.lseek(file, begin, os.SEEK_DATA)
            hole = os.lseek(file, data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            yield begin, end
            return
        if data >= end:
            return
        yield data, min(hole, end)
        begin = hole
