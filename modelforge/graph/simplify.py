"""Run onnxsim on a model file. It can raise and it can crash: call it in a child process, and compare what it gives.

Knows nothing of how its result is judged: that is :mod:`modelforge.graph.prepare`.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from modelforge.graph.load import parse

_LARGEST = "1GB"
"""What a folded constant may grow to."""


def simplify(model_path: Path, out_path: Path) -> None:
    """Fold constants and fuse nodes of ``model_path`` into ``out_path``.

    The result uses no operators of a domain that the model did not use. BatchNormalization is left to our own pass,
    which folds in float64.

    Raises:
        RuntimeError: onnxsim refuses the model (its own exceptions vary: callers catch all).
    """
    import onnxsim

    model = parse(model_path)
    onnx.load_external_data_for_model(model, str(Path(model_path).parent))
    known = _domains(model)
    for optimize in (True, False):
        simplified, _ = onnxsim.simplify(
            model, check_n=0, skip_fuse_bn=True, perform_optimization=optimize, tensor_size_threshold=_LARGEST
        )
        if _domains(simplified) <= known:
            break  # else it has fused attention into an operator that only ONNX Runtime has: constants are folded only
    # What onnxsim says of itself there differs by what else is installed.
    del simplified.metadata_props[:]
    Path(out_path).write_bytes(simplified.SerializeToString(deterministic=True))


def _domains(model: onnx.ModelProto) -> set[str]:
    """The operator domains that the nodes of a model, and of its bodies, are from."""
    found: set[str] = set()
    graphs = [model.graph, *(function for function in model.functions)]
    while graphs:
        for node in graphs.pop().node:
            found.add("" if node.domain == "ai.onnx" else node.domain)
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
            graphs += [body for attribute in node.attribute for body in attribute.graphs]
    return found
