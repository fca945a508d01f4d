"""Records and types that the tests of the bundle share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from modelforge.bundle.layout import BundleContent
from modelforge.bundle.record import Accuracy, Artifact, Batch, Calibration, Rung, Runtime, VariantRecord
from modelforge.store import digest_file

MakeContent = Callable[..., BundleContent]


def compiled_record(tag: str, engine: Path) -> VariantRecord:
    blob = digest_file(engine)
    return VariantRecord(
        target=tag,
        status="compiled",
        compiler="tensorrt-rtx",
        toolchain={"tensorrt_rtx": "1.7.1.116"},
        precision="int8",
        ladder=(Rung(precision="int8", gate="passed", value=0.979, drop=0.002),),
        batch=Batch(min=1, opt=4, max=8),
        artifact=Artifact(file="main.engine", digest=blob.digest, size=blob.size),
        runtime=Runtime(requires="TensorRT for RTX 1.7"),
        accuracy=Accuracy(
            evidence="reference", metric="top1", reference=0.981, value=0.979, drop=0.002, sqnr_db=31.2, gate="passed"
        ),
        calibration=Calibration(samples=128, digest="sha256:" + "2" * 64),
        commands=(("tensorrt_rtx", "--onnx=lowered.onnx"),),
    )
