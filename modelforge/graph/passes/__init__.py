"""Graph passes: small steps on an onnx-ir model, each `requires -> call -> ensures`, each saying whether it changed it.

:func:`run_passes` runs them in order and names the one that fails.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir

from modelforge.errors import BuildError, ModelForgeError
from modelforge.graph.passes.batchnorm import FoldBatchNormalization
from modelforge.graph.passes.cleanup import (
    InferShapes,
    LiftConstants,
    RemoveDeadNodes,
    RemoveIdentities,
    RemoveInitializerInputs,
    RemoveUnusedOpsets,
    UniqueNames,
)
from modelforge.graph.passes.input_shapes import BindSymbols, SetInputShapes

__all__ = [
    "BindSymbols",
    "FoldBatchNormalization",
    "InferShapes",
    "LiftConstants",
    "RemoveDeadNodes",
    "RemoveIdentities",
    "RemoveInitializerInputs",
    "RemoveUnusedOpsets",
    "SetInputShapes",
    "UniqueNames",
    "run_passes",
]


def run_passes(model: onnx_ir.Model, passes: Sequence[onnx_ir.passes.PassBase], where: str) -> dict[str, bool]:
    """Run the passes in order, in place; say of each whether it changed the model.

    Raises:
        ModelForgeError: as a pass raises it.
        BuildError: any other failure, with the pass's name.
    """
    modified: dict[str, bool] = {}
    for step in passes:
        name = type(step).__name__
        try:
            modified[name] = step(model).modified or modified.get(name, False)
        except ModelForgeError:
            raise
        except Exception as error:  # a pass may fail in any way on a graph that nobody foresaw: name it
            cause = error.__cause__ or error
            raise BuildError(
                f"the graph pass {name} failed: {type(cause).__name__}: {cause}",
                where=where,
                fix="this is a fault of ModelForge: report it with the model, or with the export that gives it",
            ) from error
    return modified
