"""Read, check and write an ONNX model with its external data. Untrusted input: nothing outside its folder is opened.

A protobuf message ends at 2 GiB, so weights beyond :data:`INLINE_BYTES` are written as external data.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # its types are another package

from modelforge.errors import ModelError
from modelforge.graph.walk import tensors
from modelforge.store import write_atomically

if TYPE_CHECKING:
    import onnx_ir

INLINE_BYTES = 1_500_000_000
"""Weights above this go to ``<name>.data``: room below protobuf's 2 GiB for what tools add to a graph."""

_PROTOBUF_LIMIT = 2**31 - 1
_EXPORT_AGAIN = "export the model again, or copy it again: the file may have been cut short"


def check_model(path: Path) -> None:
    """Refuse a file that is not a usable ONNX model. Reads the model file, but no external data.

    Raises:
        ModelError: no such file, not ONNX, cut short, an empty graph, external data that is missing, short or
            outside the model's folder, or whatever onnx.checker refuses.
    """
    path = Path(path)
    model = parse(path)
    if not model.graph.output:
        raise ModelError(
            "the graph has no outputs" if model.graph.node else "the graph is empty",
            where=str(path),
            fix="export the model with its outputs named",
        )
    external = _external_files(model, path)
    try:
        # The checker looks for external data beside the model only when it is given the path.
        onnx.checker.check_model(str(path) if external else model.SerializeToString())
    except onnx.checker.ValidationError as error:
        raise ModelError(
            f"onnx.checker refuses the model: {_first_lines(error)}",
            where=str(path),
            fix="mend the export; `python -m onnx.checker` shows the same message",
        ) from None


def model_files(path: Path) -> list[Path]:
    """The model file, then its external data files in order of name: what a digest of the model must cover.

    Raises:
        ModelError: as :func:`check_model` does for files.
    """
    path = Path(path)
    return [path, *_external_files(parse(path), path)]


def parse(path: Path) -> onnx.ModelProto:
    """The protobuf of a model file, external data left where it is.

    Raises:
        ModelError: the file is missing, a folder, empty, not ONNX, or larger than a protobuf can be.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError("there is no such model", where=str(path), fix="check the path under [model] in the recipe")
    if path.is_dir():
        raise ModelError("this is a folder, not an ONNX file", where=str(path), fix="give the .onnx file inside it")
    size = path.stat().st_size
    if size == 0:
        raise ModelError("the file is empty", where=str(path), fix=_EXPORT_AGAIN)
    if size > _PROTOBUF_LIMIT:
        raise ModelError(
            f"the file has {size / 2**30:.1f} GiB: no protobuf may have more than 2 GiB",
            where=str(path),
            fix="save it with external data: onnx.save(model, path, save_as_external_data=True)",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from error
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise _not_onnx(data, path) from None
    # Other protobufs, and some texts, parse as an ONNX model with nothing in it.
    if model.ir_version <= 0 or not model.HasField("graph"):
        raise _not_onnx(data, path)
    return model


def load(path: Path) -> onnx_ir.Model:
    """Load as onnx-ir; external data stays on disk and is mapped when it is read.

    Raises:
        ModelError: as :func:`check_model` does for files.
    """
    import onnx_ir

    path = Path(path)
    proto = parse(path)
    _external_files(proto, path)
    try:
        model = onnx_ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx-ir has no error class of its own for a graph that it cannot read
        raise ModelError(f"onnx-ir cannot read the graph: {_first_lines(error)}", where=str(path)) from error
    onnx_ir.external_data.set_base_dir(model.graph, str(path.parent))
    return model


def save(model: onnx_ir.Model, folder: Path, name: str = "model.onnx") -> list[Path]:
    """Write the model into ``folder``, which exists, and return its files; the same model gives the same bytes.

    Weights above :data:`INLINE_BYTES` go to ``<name>.data``; smaller ones lie inside. ``model`` is left as it was,
    but must not be used further if its own external data was overwritten.
    """
    import onnx_ir

    path = Path(folder) / name
    values = [
        value for graph in model.graphs() for value in graph.initializers.values() if value.const_value is not None
    ]
    if sum(value.const_value.nbytes for value in values if value.const_value is not None) > INLINE_BYTES:
        data = f"{name}.data"
        onnx_ir.save(model, path, format="protobuf", external_data=data)
        return [path, path.with_name(data)]
    external = {value: value.const_value for value in values if isinstance(value.const_value, onnx_ir.ExternalTensor)}
    onnx_ir.external_data.load_to_model(model)
    try:
        write_atomically(path, onnx_ir.to_proto(model).SerializeToString(deterministic=True))
    finally:
        for value, tensor in external.items():
            value.const_value = tensor
    return [path]


def _external_files(model: onnx.ModelProto, path: Path) -> list[Path]:
    """The external data files of a model, each checked: inside the folder, a plain file, long enough."""
    ends: dict[str, tuple[int, str]] = {}
    for tensor in tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location, end = _external_span(tensor, path)
        if end >= ends.get(location, (-1, ""))[0]:
            ends[location] = (end, tensor.name)
    return [_checked_file(path, location, *ends[location]) for location in sorted(ends)]


def _external_span(tensor: onnx.TensorProto, path: Path) -> tuple[str, int]:
    """Where a tensor's data lies, and the byte where it ends."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    where = f"{path}: tensor {tensor.name!r}"
    location = entries.get("location", "")
    parts = PurePosixPath(location.replace("\\", "/")).parts
    if (
        not location
        or "\0" in location
        or ".." in parts
        or PurePosixPath(location).is_absolute()
        or PureWindowsPath(location).anchor
    ):
        raise ModelError(
            f"the external data location {location!r} does not lie beside the model",
            where=where,
            fix="save the model again with its external data in the same folder",
        )
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0:
        raise ModelError(f"the external data of {location!r} has a bad offset or length", where=where)
    return location, offset + length


def _checked_file(path: Path, location: str, end: int, tensor: str) -> Path:
    file = path.parent / location
    where = f"{path}: tensor {tensor!r}"
    if not file.is_file():
        raise ModelError(
            f"the external data file {location!r} is missing", where=where, fix=f"copy it to {file.parent}"
        )
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise ModelError(
            f"the external data file {location!r} is a link out of the model's folder",
            where=where,
            fix="copy the file itself beside the model",
        )
    # onnx 1.21 and later refuse links here (CVE-2026-34446): told now rather than by a failing step.
    if file.is_symlink() or os.stat(file).st_nlink > 1:
        raise ModelError(
            f"the external data file {location!r} is a link, which onnx refuses",
            where=where,
            fix="copy the file itself beside the model: cp --remove-destination",
        )
    size = file.stat().st_size
    if size < end:
        raise ModelError(
            f"the external data file {location!r} has {size} bytes, but the model needs {end}",
            where=where,
            fix=_EXPORT_AGAIN,
        )
    return file


def _not_onnx(data: bytes, path: Path) -> ModelError:
    if data.startswith(b"version https://git-lfs"):
        return ModelError(
            "this is a Git LFS pointer, not the model itself", where=str(path), fix="fetch the file: git lfs pull"
        )
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in data[:512]):
        return ModelError("this is a text file, not an ONNX model", where=str(path), fix="give an .onnx file")
    return ModelError("the file is corrupt, or is not an ONNX model", where=str(path), fix=_EXPORT_AGAIN)


def _first_lines(error: Exception, lines: int = 2) -> str:
    """The head of a vendor's message: the rest is C++ stack."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(text[:lines])[:400] or type(error).__name__
