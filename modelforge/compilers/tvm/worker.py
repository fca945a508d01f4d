"""What runs in the child process: a lowered model in, object files and a signature out."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from modelforge.compilers.tvm import choices, codegen, frontend
from modelforge.compilers.tvm.machine import Machine
from modelforge.compilers.tvm.signature import Entry, Signature, Tensor, merge_shapes
from modelforge.compilers.tvm.weights import Weights
from modelforge.errors import BuildError, ModelForgeError, UnsupportedError
from modelforge.graph.specialize import specialize


def compile_model(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one model for one machine.

    The request holds ``model`` (path), ``folder`` (for the object files), ``inputs`` (shape by name), ``symbol``
    (the one that stands for the batch in them, or None), ``batches`` (an entry is made for each; ``[1]`` without a
    symbol) and ``machine`` (the fields of :class:`Machine`).

    It may hold ``choices``, label by key (:mod:`.choices`); the answer tells under ``applied`` which keys were found.
    The answer holds ``objects`` (paths, in the order to link), ``weights`` (the path of the blob), ``signature`` (a
    text) and ``kernels`` (the fields of :class:`~.scheduling.KernelReport`).
    """
    folder = Path(request["folder"])
    module, models, machine = imported(request)
    signature = _signature(module, models, request, sorted(request["batches"]))
    try:
        with choices.session(request.get("choices")) as said:
            objects = codegen.build(module, machine, folder / "objects")
    except Exception as error:  # TVM raises many types, none of them promised; the trace goes to the log
        traceback.print_exc()
        raise BuildError(f"generating code failed: {type(error).__name__}: {_first_line(error)}") from error
    return {
        "objects": [str(path) for path in objects.files],
        "weights": str(objects.weights.blob),
        "signature": _with_weights(signature, objects.weights, machine.cores).text(),
        "kernels": [asdict(kernel) for kernel in objects.kernels],
        "applied": sorted(said.applied),
    }


def imported(request: Mapping[str, Any]) -> tuple[Any, dict[str, Path], Machine]:
    """The module that a request of :func:`compile_model` asks for, the model of each of its graphs, and the machine."""
    models = _fixed_models(
        Path(request["model"]), Path(request["folder"]), request["symbol"], sorted(request["batches"])
    )
    machine = Machine(**{**request["machine"], "mattr": tuple(request["machine"]["mattr"])})
    return _import(models), models, machine


def _fixed_models(model: Path, folder: Path, symbol: str | None, batches: list[int]) -> dict[str, Path]:
    """A model of fixed shape per entry: the importer folds shapes only where they are numbers."""
    models: dict[str, Path] = {}
    for batch in batches:
        own = folder / f"batch-{batch}"
        own.mkdir(parents=True)
        models[f"main_b{batch}"] = specialize(model, own, {symbol: batch} if symbol else {})
    return models


def _import(models: Mapping[str, Path]) -> Any:
    try:
        return frontend.import_entries(models)
    except ModelForgeError:
        raise
    except Exception as error:  # the importer raises OpNotImplemented, TypeError, ValueError, InternalError ...
        traceback.print_exc()
        raise UnsupportedError(
            f"TVM's importer cannot have it: {type(error).__name__}: {_first_line(error)}",
            where=frontend.failing_node(error),
            fix="give the model fixed shapes and opset 13 to 18, or leave this operator out of the compiled stage",
        ) from error


def _signature(module: Any, models: Mapping[str, Path], request: Mapping[str, Any], batches: list[int]) -> Signature:
    symbol = request["symbol"]
    inputs, outputs = frontend.tensors(next(iter(models.values())))
    names = [name for name, _ in outputs]
    found = [frontend.output_shapes(module, function, names) for function in models]
    for name, shape in ((name, shape) for shapes in found for name, shape in zip(names, shapes, strict=True)):
        if 0 in shape:
            raise UnsupportedError(
                f"an output holds no number: its shape is {list(shape)}", where=f"output {name}", fix="leave it out"
            )
    described = []
    for position, (name, dtype) in enumerate(outputs):
        shapes = [shapes[position] for shapes in found]
        try:
            described.append(Tensor(name, dtype, merge_shapes(shapes, batches) if symbol else shapes[0]))
        except ValueError as error:
            raise UnsupportedError(
                f"an output does not have the batch as its leading dimension, and only there: {error}",
                where=f"output {name}",
                fix="compile for a fixed batch: write an integer there under [inputs]",
            ) from error
    return Signature(
        inputs=tuple(
            Tensor(name, dtype, ("*", *shape[1:]) if symbol and symbol in request["inputs"][name] else shape)
            for name, dtype, shape in inputs
        ),
        outputs=tuple(described),
        entries=tuple(Entry(batch, function) for batch, function in zip(batches, models, strict=True)),
    )


def _with_weights(signature: Signature, weights: Weights, threads: int) -> Signature:
    entries = tuple(replace(entry, weights=weights.uses[entry.function]) for entry in signature.entries)
    return replace(signature, entries=entries, weights=weights.table, weight_bytes=weights.size, threads=threads)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
