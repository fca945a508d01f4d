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

    BatchNormalization is left to our own pass, which folds in float64.

    Raises:
        RuntimeError: onnxsim refuses the model (its own exceptions vary: callers catch all).
    """
    import onnxsim

    model = parse(model_path)
    onnx.load_external_data_for_model(model, str(Path(model_path).parent))
    simplified, _ = onnxsim.simplify(model, check_n=0, skip_fuse_bn=True, tensor_size_threshold=_LARGEST)
    # What onnxsim says of itself there differs by what else is installed.
    del simplified.metadata_props[:]
    Path(out_path).write_bytes(simplified.SerializeToString(deterministic=True))
