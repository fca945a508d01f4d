"""Bundles to choose from: made-up artifacts, with the records and "about" that a build writes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelforge.bundle.device import DeviceFacts
from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent, write_bundle
from modelforge.bundle.read import Bundle, open_bundle
from modelforge.bundle.record import VariantRecord
from modelforge.store import canonical_json, digest_file

ABOUT = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 48, 192]}],
    "outputs": [{"name": "scores", "dtype": "float32", "shape": ["batch", 2]}],
    "dims": {"batch": {"min": 1, "opt": 4, "max": 8}},
    "serving": {"task": "text-orientation", "latency_budget_ms": 50.0, "fallback": []},
}

COMPILERS = {
    "t4": ("tensorrt-rtx", "main.engine", {"tensorrt_rtx": "==1.7.1.116", "sm": 75}),
    "a100": ("tensorrt-rtx", "main.engine", {"tensorrt_rtx": "==1.7.1.116", "sm": 80}),
    "jetson-agx-orin": ("tensorrt", "main.plan", {"tensorrt": "==10.3.0.30", "sm": 87}),
    "ascend-310p3": ("ascend", "main.om", {"cann": ">=8.0.RC1", "soc_version": "Ascend310P3"}),
    "rk3588": ("rockchip", "main.rknn", {"rknn": ">=2.3.0", "platform": "rk3588"}),
    "qualcomm-htp-v73": ("qualcomm", "main.bin", {"qnn": ">=2.30", "htp_arch": 73, "soc_model": 43}),
    "cortex-a76": ("tvm", "main.so", {"glibc": ">=2.28"}),
    "x86-64": ("onnxruntime", "main.onnx", {"onnxruntime": ">=1.23"}),
    "x86-64-avx512": ("onnxruntime", "main.onnx", {"onnxruntime": ">=1.23"}),
}

T4_SERVER = {
    "isa": "x86-64",
    "cpuinfo": ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"],
    "gpus": [{"name": "Tesla T4", "sm": 75}],
    "ascend": [],
    "rockchip": [],
    "qualcomm": [],
    "versions": {"tensorrt_rtx": "1.7.1.116", "onnxruntime": "1.32.0", "glibc": "2.36"},
}
PI_5 = {
    "isa": "aarch64",
    "cpuinfo": ["asimd", "asimddp", "fphp", "asimdhp", "atomics", "crc32"],
    "gpus": [],
    "ascend": [],
    "rockchip": [],
    "qualcomm": [],
    "versions": {"glibc": "2.36"},
}


def device(facts: Mapping[str, Any], **more: Any) -> DeviceFacts:
    """Facts of a device; ``versions`` are added to those that it has."""
    versions = {**facts.get("versions", {}), **more.pop("versions", {})}
    return DeviceFacts.model_validate_json(canonical_json({**facts, **more, "versions": versions}))


def record(tag: str, **more: Any) -> dict[str, Any]:
    """A compiled variant; ``needs`` replaces what it needs."""
    compiler, file, needs = COMPILERS[tag]
    needs = more.pop("needs", needs)
    runtime = {"requires": f"what {compiler} needs"} | ({"needs": needs} if needs else {})
    data = {
        "target": tag,
        "status": "compiled",
        "compiler": compiler,
        "toolchain": {compiler: "1.0"},
        "precision": "int8",
        "batch": {"min": 1, "opt": 4, "max": 8},
        "artifact": {"file": file},
        "runtime": runtime,
        "accuracy": {"evidence": "reference", "metric": "top1", "reference": 0.98, "value": 0.979, "drop": 0.001,
                     "gate": "passed"},
    } | more  # fmt: skip
    if data["status"] != "compiled":
        data |= {"artifact": None, "runtime": None}
    return data


def timed(**by_batch: float) -> dict[str, Any]:
    """Measured: ``timed(b1=2.0, b4=5.0)``."""
    return {"evidence": "device", "by_batch": {key.removeprefix("b"): time for key, time in by_batch.items()}}


def make(
    folder: Path, records: Sequence[Mapping[str, Any]], about: Mapping[str, Any] | None = None, **more: Any
) -> Path:
    """Write a bundle; ``lowered`` gives every variant a lowered model of these bytes, ``data`` external data to each
    file that ends in .onnx."""
    folder.mkdir(parents=True, exist_ok=True)
    variants = []
    for at, given in enumerate(records):
        data = dict(given)
        files = []
        if data["artifact"]:
            name = data["artifact"]["file"]
            path = folder / f"{at}-{name}"
            path.write_bytes(more.get("artifact", random.Random(at).randbytes(2000)))
            blob = digest_file(path)
            data["artifact"] = {"file": name, "digest": blob.digest, "size": blob.size}
            files.append(BundleFile(name, "artifact", "application/octet-stream", path))
        for title, role, content in more.get("files", ()):
            path = folder / f"{at}-{role}-{title}"
            path.write_bytes(content)
            files.append(BundleFile(title, role, "application/octet-stream", path))
        variants.append(VariantContent(VariantRecord.from_bytes(canonical_json(data), where=data["target"]), files))
    content = BundleContent("ppocr-cls", more.get("version", "1.2.0"), ABOUT if about is None else about, variants)
    return write_bundle(folder / f"ppocr-cls-{content.version}", content).path


def opened(
    folder: Path, records: Sequence[Mapping[str, Any]], about: Mapping[str, Any] | None = None, **more: Any
) -> Bundle:
    return open_bundle(make(folder, records, about, **more))
