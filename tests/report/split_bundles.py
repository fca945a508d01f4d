"""A bundle of a split model: two stages over three tiers, a skip past a stage, INT8 transport, two chains of variants.

The figures are made up, of the size that a text detector shows; the same in every run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.report.report_bundles import ABOUT, Maker, record

BATCHES = ("1", "2", "4", "8")


def split_bundle(folder: Path) -> Path:
    """`head` measured on its device, `body` and `tail` estimated, `tail` above the budget on one of its targets."""
    maker = Maker(folder / "sources")
    head = latency("device", (4.1, 7.6, 14.2, 27.9), (3.2, 6.1, 12.0, 23.8), threads=1)
    maker.add(record("cortex-a76", "int8", drop=0.002, sqnr=31.0, stage="head", latency=head), {})
    body = latency("none", None, (0.9, 1.1, 1.6, 2.6))
    maker.add(record("jetson-agx-orin", "fp16", drop=0.0, sqnr=66.0, stage="body", latency=body), {})
    tail = latency("none", None, (0.4, 0.45, 0.5, 0.7))
    maker.add(record("a100", "fp16", drop=0.0, sqnr=65.0, stage="tail", latency=tail), {})
    slow = record("x86-64", "int8", drop=0.004, sqnr=28.0, stage="tail",
                  latency=latency("device", (61.0, 118.0, 230.0, 455.0), None))  # fmt: skip
    maker.add(slow | {"accuracy": slow["accuracy"] | {"per_output": grouped_outputs()}}, {})
    return maker.write(folder / "detector-1.2.0", ABOUT | split_about())


def latency(
    evidence: str, measured: tuple[float, ...] | None, estimated: tuple[float, ...] | None, **more: Any
) -> dict[str, Any]:
    found: dict[str, Any] = {"evidence": evidence, **more}
    if measured is not None:
        found |= {"p50_ms": measured[2], "batch": 4, "by_batch": dict(zip(BATCHES, measured, strict=True))}
    if estimated is not None:
        found["estimate"] = {
            "by_batch": dict(zip(BATCHES, estimated, strict=True)),
            "method": "roofline of the profile",
        }
    return found


def grouped_outputs() -> list[dict[str, Any]]:
    """Groups before their output and after it: the page puts them under it."""
    return [
        {"output": "detections", "group": "boxes", "sqnr_db": 41.0, "cosine": 0.9999},
        {"output": "mask", "sqnr_db": 33.0, "cosine": 0.9997},
        {"output": "detections", "sqnr_db": 40.0, "cosine": 0.9999},
        {"output": "detections", "group": "scores", "sqnr_db": 17.5, "cosine": 0.991, "agreement": 0.97},
    ]


def tensor(name: str, shape: list[Any], size: int, source: str, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape, "bytes": size, "from": source, "to": [], "is_output": False}


def split_about() -> dict[str, Any]:
    image = tensor("x", ["batch", 3, 640, 640], 4_915_200, "input")
    skip = tensor("conv2d_469.tmp_0", ["batch", 24, 160, 160], 2_457_600, "head")
    deep = tensor("depthwise_conv2d_3.tmp_0", ["batch", 56, 40, 40], 358_400, "head")
    count = tensor("shape_0", [4], 32, "head", "int64")
    late = tensor("batch_norm_9.tmp_2", ["batch", 96, 20, 20], 153_600, "body")
    out = tensor("detections", ["batch", 6, 400], 9_600, "tail")
    mask = tensor("mask", ["batch", 1, 160, 160], 102_400, "tail")
    stages = [
        stage("head", [image], [skip, deep, count], 96, 2_490_000_000, 1_312_000),
        stage("body", [deep], [late], 151, 1_630_000_000, 2_704_000),
        stage("tail", [late, skip, count], [out, mask], 83, 690_000_000, 690_112),
    ]
    return {
        "targets": {
            "cortex-a76": {"title": "Arm Cortex-A76, four cores (Raspberry Pi 5)", "tier": "device", "arch": {}},
            "jetson-agx-orin": {"title": "NVIDIA Jetson AGX Orin 64 GB", "tier": "edge", "arch": {}},
            "a100": {"title": "NVIDIA A100 80 GB", "tier": "cloud", "arch": {}},
        },
        "split": {
            "schema": 1,
            "method": "tiers",
            "sizes": {"batch": 1},
            "notes": ["cut over three tiers: 69.9 ms in all, of which links 44.0 ms"],
            "stages": stages,
            "outputs": [{"name": "detections", "from": "tail"}, {"name": "mask", "from": "tail"}],
            "transport": {
                "depthwise_conv2d_3.tmp_0": {"dtype": "uint8", "scale": 0.0263, "zero_point": 0},
                "batch_norm_9.tmp_2": {"dtype": "uint8", "scale": 0.0871, "zero_point": 128},
                "conv2d_469.tmp_0": {"dtype": "float16"},
            },
            "chains": [
                {
                    "stages": [
                        {"stage": "head", "target": "cortex-a76", "evidence": "device"},
                        {"stage": "body", "target": "jetson-agx-orin", "evidence": "reference"},
                        {"stage": "tail", "target": "a100", "evidence": "reference"},
                    ],
                    "accuracy": {
                        "metric": "top1", "reference": 0.9861, "value": 0.9833, "drop": 0.0028, "max_drop": 0.01,
                        "sqnr_db": 29.4, "cosine": 0.9994, "agreement": 0.9944, "samples": 360, "gate": "passed",
                        "identical": False,
                    },
                    "lowered": {
                        "metric": "top1", "reference": 0.9861, "value": 0.9842, "drop": 0.0019, "max_drop": 0.01,
                        "samples": 5000, "gate": "passed",
                    },
                },
                {
                    "stages": [
                        {"stage": "head", "target": "cortex-a76"},
                        {"stage": "body", "target": "jetson-agx-orin"},
                        {"stage": "tail", "target": "x86-64"},
                    ],
                    "reason": "a variant of it is missing",
                },
            ],
            "tiers": tiers(),
        },
    }  # fmt: skip


def stage(name: str, inputs: list[Any], outputs: list[Any], layers: int, flops: int, weights: int) -> dict[str, Any]:
    return {
        "name": name, "file": f"{name}.onnx", "inputs": inputs, "outputs": outputs, "layers": layers, "flops": flops,
        "weight_bytes": weights, "activation_bytes": 9_830_400, "seconds": flops / 8e10,
    }  # fmt: skip


def tiers() -> dict[str, Any]:
    """The three kinds of answers, and how they follow each other as the link gets faster."""
    links = [
        {"from": "device", "to": "edge", "latency_ms": 2.0, "bandwidth": 5e6},
        {"from": "edge", "to": "cloud", "latency_ms": 10.0, "bandwidth": 2e6},
    ]
    stay = way("all on device", {}, 0, (0.0, 77.64, 0.0))
    cut = way("cut", {"device-edge": ["depthwise_conv2d_3.tmp_0", "conv2d_469.tmp_0"]}, 614_400, (0.0, 28.44, 1.86))
    send = way("send the input to edge", {"device-edge": ["x"]}, 1_228_800, (0.0, 0.0, 2.43))
    far = way("send the input to cloud", {"device-edge": ["x"], "edge-cloud": ["x"]}, 1_228_800, (1.18, 0.0, 0.0))
    sweep = []
    for factor in (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0, 256.0):
        best = min((over(each, 5e6 * factor) for each in (stay, cut, send)), key=lambda each: each["total_ms"])
        sweep.append({"factor": factor, **best})
    cuts = [*(over(each, 5e6) for each in (cut, stay, send, far)), over(cut, 5e6) | {"fits": False, "total_ms": 400.0}]
    return {"estimate": True, "transport": "int8", "return_outputs": True, "links": links, "cuts": cuts, "sweep": sweep}


def way(kind: str, crossing: dict[str, list[str]], int8: int, times: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "kind": kind, "route": ["device", "edge"][: 1 + bool(crossing)], "crossing": crossing,
        "bytes": {"fp32": 4 * int8, "fp16": 2 * int8, "int8": int8},
        "tier_ms": dict(zip(("cloud", "device", "edge"), times, strict=True)), "fits": True,
    }  # fmt: skip


def over(found: dict[str, Any], bandwidth: float) -> dict[str, Any]:
    """A way with its times over links of a bandwidth."""
    there = 2.0 + found["bytes"]["int8"] / bandwidth * 1e3
    links = dict.fromkeys(found["crossing"], there) | ({"edge-device": 2.1} if found["crossing"] else {})
    return found | {"link_ms": links, "total_ms": sum(found["tier_ms"].values()) + sum(links.values())}


def named_split(name: str) -> dict[str, Any]:
    """`about` with ``name`` for everything in it that can be a free text, and the shapes kept."""

    def renamed(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            # Names of tensors, tiers, links and targets are keys here; each stays another one.
            open_keys = key in ("crossing", "tier_ms", "link_ms", "sizes", "targets")
            return {(f"{each}{name}" if open_keys else each): renamed(one, each) for each, one in value.items()}
        if isinstance(value, list):
            return [renamed(each, key) for each in value]
        return f"{value}{name}" if isinstance(value, str) and key not in ("method",) else value

    about = split_about()
    ways = about["split"].pop("transport")
    found: dict[str, Any] = renamed(about)
    found["split"]["transport"] = {
        f"{tensor}{name}": way | {"dtype": f"{way['dtype']}{name}"} for tensor, way in ways.items()
    }
    found["split"]["tiers"]["transport"] = "int8"
    found["split"]["candidates"] = [
        {"tensors": [f"t{name}"], "flops_before": 0.5, "bytes": {"fp32": 4, "fp16": 2, "int8": 1}}
    ]
    return found | {"serving": {"latency_budget_ms": 10.0, "fallback": [name]}}
