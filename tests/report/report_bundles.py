"""Bundles as a build with INT8 leaves them: four variants with accuracy, calibration and sensitivity files.

The figures are made up, of the size and shape that real networks show; the same in every run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent, write_bundle
from modelforge.bundle.record import VariantRecord
from modelforge.store import canonical_json, digest_file

OUTPUT = "save_infer_model/scale_0.tmp_1"
DATA_DIGEST = "sha256:" + "5c" * 32

Documents = Mapping[str, Any]


@dataclass
class Maker:
    """Writes the files of variants to a folder, and puts them together to a bundle."""

    folder: Path
    variants: list[VariantContent] = field(default_factory=list)

    def add(self, record: Mapping[str, Any], documents: Mapping[str, Documents | bytes]) -> None:
        """One variant; a compiled one gets an artifact, and every document becomes a report file."""
        place = self.folder / f"{len(self.variants)}"
        place.mkdir(parents=True)
        files, data = [], dict(record)
        if data["status"] == "compiled":
            artifact = place / "main.engine"
            artifact.write_bytes(random.Random(data["target"]).randbytes(48_000))
            blob = digest_file(artifact)
            data["artifact"] = {"file": artifact.name, "digest": blob.digest, "size": blob.size}
            files.append(BundleFile(artifact.name, "artifact", "application/octet-stream", artifact))
        for name, document in documents.items():
            path = place / name
            path.write_bytes(document if isinstance(document, bytes) else canonical_json(document))
            files.append(BundleFile(name, "report", "application/json", path))
        self.variants.append(VariantContent(VariantRecord.from_bytes(canonical_json(data), where=name_of(data)), files))

    def write(self, destination: Path, about: Mapping[str, Any] | None = None) -> Path:
        content = BundleContent("ppocr-cls", "1.2.0", ABOUT if about is None else about, self.variants)
        return write_bundle(destination, content).path


def name_of(record: Mapping[str, Any]) -> str:
    return str(record["target"])


def int8_bundle(folder: Path) -> Path:
    """INT8 that passed, `mixed` that needed a search, a ladder that fell to FP16, one that failed, one deferred."""
    maker = Maker(folder / "sources")
    calibration = calibration_document(28)
    maker.add(
        record("a100", "int8", drop=0.002, sqnr=27.9, latency={"evidence": "none"}),
        {
            "accuracy.json": accuracy_document(drop=0.002, sqnr=27.9),
            "calibration.json": calibration,
            "sensitivity.json": {"schema": 1, "metric": "top1", "ranking": ranking(), "curve": [], "chosen": None},
        },
    )
    maker.add(
        record("cortex-a76", "mixed", drop=0.0075, sqnr=22.4, latency={"evidence": "device", "batch": 1, "rounds": 50,
               "min_ms": 7.91, "p50_ms": 8.24, "p90_ms": 9.7, "p99_ms": 12.1},
               ladder=[rung("int8", "failed", 0.021, 14.2, "top1 drops by 0.0210, allowed is 0.0100"),
                       rung("mixed", "passed", 0.0075, 22.4)]),
        {
            "accuracy.json": accuracy_document(drop=0.0075, sqnr=22.4, kept=6),
            "calibration.json": calibration,
            "sensitivity.json": sensitivity_document(),
        },
    )  # fmt: skip
    maker.add(
        record("t4", "fp16", drop=0.0, sqnr=66.6,
               ladder=[rung("int8", "failed", 0.034, 9.1, "top1 drops by 0.0340, allowed is 0.0100; output "
                            f'"{OUTPUT}" has an agreement of 0.9400, asked for is 0.9500'),
                       rung("mixed", "failed", 0.013, 15.7, "top1 drops by 0.0130, allowed is 0.0100"),
                       rung("fp16", "passed", 0.0, 66.6)]),
        {"report.json": build_document()},
    )  # fmt: skip
    maker.add(
        record("x86-64", "int8", drop=-0.0025, sqnr=30.1, latency={"evidence": "device", "p50_ms": 11.4},
               ladder=[rung("int8", "passed", -0.0025, 30.1)]),
        {
            "accuracy.json": accuracy_document(drop=-0.0025, sqnr=30.1, ladder=[
                {**rung("int8", "passed", -0.0025, 30.1), "latency_ms": 11.4},
                {**rung("fp32", "passed", 0.0, None), "identical": True, "latency_ms": 6.5},
            ]),
            "calibration.json": calibration_document(28, symmetric=True),
        },
    )  # fmt: skip
    failed = {
        "target": "rk3588", "status": "failed", "compiler": "rknn", "precision": None,
        "ladder": [rung("int8", "failed", 0.19, 4.4, "top1 drops by 0.1900, allowed is 0.0100")],
        "notes": ["no rung of the ladder ['int8'] met its gate"],
    }  # fmt: skip
    maker.add(failed, {})
    deferred = {"target": "jetson-agx-orin", "status": "deferred", "compiler": "tensorrt", "precision": "int8"}
    maker.add(deferred, {})
    return maker.write(folder / "ppocr-cls-1.2.0")


ABOUT = {
    "modelforge": "0.2.0",
    "model": {"digest": "sha256:" + "e4" * 32, "producer": "PaddlePaddle", "opsets": {"": 11}},
    "recipe": {"digest": "sha256:" + "1b" * 32},
    "serving": {"task": "text-orientation", "latency_budget_ms": 10.0, "fallback": ["t4", "a100"]},
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 48, 192]}],
    "outputs": [{"name": OUTPUT, "dtype": "float32", "shape": ["?", 2]}],
}


def record(target: str, precision: str, *, drop: float, sqnr: float, **more: Any) -> dict[str, Any]:
    """A compiled variant that passed its gate."""
    return {
        "target": target,
        "status": "compiled",
        "compiler": "tvm" if target.startswith("cortex") else "tensorrt-rtx",
        "toolchain": {"apache-tvm": "0.27.0.post1", "linker-aarch64": "ziglang 0.17.1"},
        "precision": precision,
        "ladder": [rung(precision, "passed", drop, sqnr)],
        "batch": {"min": 1, "opt": 4, "max": 8},
        "runtime": {"requires": "TensorRT-RTX runtime 1.7.x, an NVIDIA GPU, and its driver"},
        "accuracy": {
            "evidence": more.get("latency", {}).get("evidence", "none").replace("none", "reference"),
            "metric": "top1",
            "reference": 0.98,
            "value": 0.98 - drop,
            "drop": drop,
            "sqnr_db": sqnr,
            "cosine": 1 - 10 ** (-sqnr / 10) / 2,
            "agreement": 0.9925,
            "samples": 400,
            "max_drop": 0.01,
            "gate": "passed",
            "per_output": [{"output": OUTPUT, "sqnr_db": sqnr, "cosine": 0.9991, "agreement": 0.9925}],
        },
        "calibration": {"samples": 128, "digest": DATA_DIGEST} if precision in ("int8", "mixed") else None,
        "commands": [["tvm.compile", "llvm", "-mtriple=aarch64-linux-gnu", "-mcpu=cortex-a76"],
                     ["python", "-m", "ziglang", "ld.lld", "-shared", "-o", "main.so", "lib0.o", "devc.o"]],
        "notes": ["built without a GPU; compute-capability compatible, not run on one"],
        **more,
    }  # fmt: skip


def rung(precision: str, gate: str, drop: float, sqnr: float | None, reason: str | None = None) -> dict[str, Any]:
    figures = {"precision": precision, "gate": gate, "metric": "top1", "value": 0.98 - drop, "drop": drop}
    figures |= {"agreement": 1 - abs(drop), "samples": 400}
    return figures | ({} if sqnr is None else {"sqnr_db": sqnr}) | ({} if reason is None else {"reason": reason})


def accuracy_document(
    *, drop: float, sqnr: float, kept: int = 0, ladder: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    worst = [layer["node"] for layer in ranking()[:kept]]
    layers = [
        {**layer, "sqnr_db": 52.0 + at, "precision": "fp32", "reason": WHY_KEPT}
        if layer["node"] in worst
        else {**layer, "precision": "int8"}
        for at, layer in enumerate(ranking())
    ]
    if kept:
        layers.append({"node": "softmax_0", "op": "Softmax", "precision": "fp32", "reason": "a softmax loses most"})
    return {
        "schema": 1, "metric": "top1", "reference": 0.98, "value": 0.98 - drop, "drop": drop, "max_drop": 0.01,
        "samples": 400, "gate": "passed", "reasons": [], "ladder": ladder or [], "layers": layers,
        "per_output": [{"output": OUTPUT, "sqnr_db": sqnr, "cosine": 0.9991, "max_abs": 0.0871, "agreement": 0.9925,
                        "identical": False}],
    }  # fmt: skip


WHY_KEPT = "among the layers that lose most; with these kept higher the gate was met"


def ranking(count: int = 36) -> list[dict[str, Any]]:
    """Layers of a small MobileNet, worst first."""
    dice = random.Random(11)
    names = ["conv2d_0.tmp_0", "linear_0.tmp_0"]
    names += [f"{kind}_{at}.tmp_0" for at in range(1, 1 + count // 3) for kind in ("conv2d", "depthwise_conv2d", "se")]
    found = []
    for at, name in enumerate(names[:count]):
        sqnr = 16.0 + 22.0 * (1 - math.exp(-at / 9)) + dice.uniform(-4, 4)
        found.append({"node": name, "op": "Gemm" if "linear" in name else "Conv", "sqnr_db": round(sqnr, 3)})
    return sorted(found, key=lambda layer: layer["sqnr_db"])


def sensitivity_document() -> dict[str, Any]:
    curve = [(0, 0.021, 14.2), (1, 0.0175, 15.9), (2, 0.016, 16.4), (4, 0.012, 19.8), (5, 0.0125, 19.1),
             (6, 0.0075, 22.4), (8, 0.005, 24.0), (16, 0.0025, 27.7)]  # fmt: skip
    points = [
        {"excluded": excluded, "value": 0.98 - drop, "drop": drop, "sqnr_db": sqnr, "agreement": 1 - drop,
         "gate": "passed" if drop <= 0.01 else "failed"}
        for excluded, drop, sqnr in curve
    ]  # fmt: skip
    return {"schema": 1, "metric": "top1", "ranking": ranking(), "curve": points, "chosen": 6}


def calibration_document(count: int, *, symmetric: bool = False, bins: int = 64) -> dict[str, Any]:
    """Activations as they are: bell-shaped at the input, one-sided after a ReLU, with a long tail in some."""
    dice = random.Random(5)
    tensors = []
    for at in range(count):
        high, tail = 2 ** dice.uniform(-1, 5), dice.random() < 0.4
        low = -high * dice.uniform(0.3, 1) if at % 3 == 0 else 0.0
        centers = [low + (high - low) * (bin_ + 0.5) / bins for bin_ in range(bins)]
        spread = high * (0.12 if tail else 0.35)
        counts = [int(2e5 * math.exp(-((center / spread) ** 2) / 2) + (3 if tail else 0)) for center in centers]
        top = high * (0.62 if tail else 1.0)
        bottom = -top if symmetric else max(low, -top)
        tensors.append(
            {"name": f"batch_norm_{at}.tmp_3" if at else "x", "minimum": low, "maximum": high, "low": bottom,
             "high": top, "zeros": sum(counts) // 3 if low == 0 else 12,
             "bins": {"low": low, "high": high, "counts": counts}}
        )  # fmt: skip
    return {"schema": 1, "samples": 128, "data_digest": DATA_DIGEST, "method": "auto", "tensors": tensors}


def build_document() -> dict[str, Any]:
    """Today's report.json, of an FP16 variant with nodes that stayed in FP32."""
    return {
        "accuracy": {"per_output": [{"output": OUTPUT, "max_abs": 0.00307}], "reasons": []},
        "prepare": {"nodes_before": 566, "nodes_after": 180, "opset": 17, "opset_raised": "from 11", "simplify": "kept",
                    "passes": {"FoldBatchNormalization": True, "UniqueNames": False}, "sizes": [{"batch": 6}]},
        "lower": {"casts": 6, "converted": 176, "kept": {
            "p2o.ReduceMean.3": "sums 1,024 values: more than FP16 adds up exactly",
            "p2o.ReduceMean.7": "sums 1,024 values: more than FP16 adds up exactly",
            "p2o.Exp.0": "its output reaches 98,304: above what FP16 holds"}},
        "compile": {"engine_version": "1.7.1.116", "layers": 226, "warnings": [],
                    "functions": {"fused_conv2d": "tiled 4x16", "fused_conv2d_1": "left as it is"}},
    }  # fmt: skip
