"""Bind symbols of a prepared model to sizes, for compilers that need static shapes. Checked as preparation is."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from modelforge.errors import BuildError
from modelforge.graph.compare import compare, reference_samples
from modelforge.graph.load import load, save
from modelforge.graph.passes import BindSymbols, InferShapes, UniqueNames, run_passes
from modelforge.graph.passes.input_shapes import read_shape
from modelforge.graph.prepare import simplify_checked


def specialize(model: Path, folder: Path, sizes: Mapping[str, int]) -> Path:
    """Write ``folder/model.onnx``, which is ``model`` at these sizes, and return its path.

    Symbols that ``sizes`` does not name stay. With fixed shapes the simplifier folds shape arithmetic away; where it
    fails, or its result differs from ``model`` in ONNX Runtime, the model is written without it.

    Raises:
        ModelError: a symbol that no input has, or the model does not run at these sizes.
        BuildError: a graph pass failed, or changed what the model computes.
    """
    model, folder = Path(model), Path(folder)
    where = str(model)
    folder.mkdir(parents=True, exist_ok=True)
    graph = load(model)
    run_passes(graph, [BindSymbols(sizes, where), InferShapes()], where)
    shapes = {str(value.name): read_shape(value) or () for value in graph.graph.inputs if value.shape is not None}
    samples = reference_samples(model, shapes, sizes, where)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".specialize-") as temporary:
        work = Path(temporary)
        current = save(graph, work, "bound.onnx")[0]
        difference = compare(current, samples)
        if difference.reason:
            raise BuildError(
                f"with fixed sizes the model computes something else: {difference.reason}",
                where=where,
                fix=f"leave dimensions dynamic, or give others than {dict(sizes)}",
            )
        current, _ = simplify_checked(current, work, samples)
        graph = load(current)
        run_passes(graph, [UniqueNames(), InferShapes()], where)
        for file in reversed(save(graph, work)):  # the model last: it is what says that its data is complete
            shutil.move(file, folder / file.name)
    return folder / "model.onnx"
