"""Every operator that ONNX has a test for, in FP16: it converts, loads in ONNX Runtime, and its answers stay close."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelforge.graph.compare import open_session
from modelforge.graph.fp16 import convert_fp16


def _cases() -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases divide by zero on purpose
        return [case for case in collect_testcases(None) if case.model is not None]


def _session(path: Path) -> Any:
    """None where ONNX Runtime's CPU does not have the operator in FP32 either."""
    with contextlib.suppress(Exception):  # ONNX Runtime's classes share no base
        return open_session(path, optimize=False)
    return None


@pytest.mark.slow  # about 1,900 models, 40 s
def test_every_operator(tmp_path: Path) -> None:
    source, wrong, compared = tmp_path / "model.onnx", [], 0
    for case in _cases():
        source.write_bytes(case.model.SerializeToString())
        session = _session(source)
        if session is None:
            continue
        convert_fp16(source, tmp_path / "half")
        half = open_session(tmp_path / "half/model.onnx")
        feeds = dict(zip([value.name for value in session.get_inputs()], case.data_sets[0][0], strict=False))
        try:
            exact = session.run(None, feeds)
        except Exception:  # data that is no array, optional inputs that are not given: the case is not for us
            continue
        compared += 1
        for reference, value in zip(exact, half.run(None, feeds), strict=True):
            if not _is_close(reference, value):
                wrong.append(case.name)
    assert wrong == []
    assert compared > 1000


def _is_close(reference: Any, value: Any) -> bool:
    if not isinstance(reference, np.ndarray) or reference.dtype.kind != "f":
        return True
    finite = np.isfinite(reference) & (np.abs(reference) < 6e4)
    scale = max(1.0, float(np.abs(reference[finite]).max(initial=0)))
    return value.dtype == reference.dtype and bool(np.allclose(reference[finite], value[finite], atol=1e-2 * scale))
