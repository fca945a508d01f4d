"""What share of a machine's peak a compiler's code reaches: published figures as data, corrected by measurements.

The roofline with these shares is an estimate. Where a variant was measured on the device, :func:`record_measurement`
keeps measured / estimated, and :func:`factor_for` gives the correction with its error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from filelock import FileLock

from modelforge.errors import InputError
from modelforge.graph.roofline import Machine
from modelforge.store import default_home, write_atomically
from modelforge.target import Target

PRECISIONS = ("fp32", "fp16", "int8")
"""Widest first. ``mixed`` lies between ``int8`` and ``fp16``."""
FLOAT_BYTES: Mapping[str, float] = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Efficiency:
    """Shares of the profile's peak that are reached.

    Attributes:
        conv, matmul, other: of the arithmetic peak at the precision, by kind of layer.
        memory: of the memory bandwidth.
        overhead: seconds to start a layer.
        cores: ``one`` where a single inference runs on one of the unit's cores.
    """

    conv: float
    matmul: float
    other: float
    memory: float
    overhead: float
    source: str
    cores: Literal["all", "one"] = "all"


EFFICIENCY: Mapping[str, Efficiency] = {
    "onnxruntime": Efficiency(
        0.7, 0.7, 0.2, 0.6, 2e-6,
        "measured: ONNX Runtime 1.32, ResNet-50 in FP32 on one AVX-512 core, 222 GFLOP/s of about 256; several cores "
        "are taken to lose some",
    ),
    "tvm": Efficiency(
        0.6, 0.5, 0.2, 0.6, 2e-6,
        "measured: TVM 0.27 takes 1.2 times as long as ONNX Runtime for ResNet-50 on x86-64, one thread; "
        "matrix products and ARM are taken to be alike",
    ),
    "tensorrt": Efficiency(
        0.35, 0.35, 0.1, 0.7, 10e-6,
        "MLPerf Inference v0.5, T4, ResNet-50 offline, about 5600 images/s in INT8 (from memory); overhead from "
        "hokwangchoi.com/blog/vision-benchmarks: YOLOv8n in INT8 on Orin Nano, 3.49 ms",
    ),
    "tensorrt-rtx": Efficiency(0.35, 0.35, 0.1, 0.7, 10e-6, "estimate: taken to be as TensorRT"),
    "rockchip": Efficiency(
        0.42, 0.045, 0.03, 0.5, 20e-6,
        "github.com/airockchip/rknn_model_zoo README_CN.md: RK3588 on one core resnet50-v2 110.4, yolov8n 74.0, "
        "clip_images (FP16) 6.5 a second; RK3566 38.5, 34.4, 2.3",
        cores="one",
    ),
    "ascend": Efficiency(0.3, 0.3, 0.05, 0.6, 10e-6, "estimate: no figure for one inference was found"),
    "qualcomm": Efficiency(0.3, 0.1, 0.02, 0.5, 30e-6, "estimate: no figure for one inference was found"),
    "ethos-u": Efficiency(0.3, 0.1, 0.02, 0.5, 30e-6, "estimate: Vela's own figure of each model is in vela.csv"),
}  # fmt: skip
_UNKNOWN = Efficiency(0.3, 0.3, 0.1, 0.5, 10e-6, "estimate: nothing is known of this compiler")


@dataclass(frozen=True)
class Factor:
    """What estimates are multiplied by.

    Attributes:
        value: the median of measured / estimated, 1 where nothing was measured.
        measurements: how many stand behind it.
        error: median relative error of an estimate that is corrected by the *other* measurements; None below two.
        scope: what they were made on: ``target, compiler and precision``, or ``target and compiler``.
    """

    value: float = 1.0
    measurements: int = 0
    error: float | None = None
    scope: str = ""


@dataclass(frozen=True)
class Measurement:
    """One variant on its device: seconds for one execution, as estimated without correction and as measured."""

    target: str
    compiler: str
    precision: str
    model: str
    batch: int
    estimated: float
    measured: float


def counted_as(precision: str) -> str:
    """``mixed`` counts as ``int8``: what its float layers cost is not known before they are chosen."""
    return "int8" if precision == "mixed" else precision


def machine_for(target: Target, precision: str, compiler: str) -> Machine | None:
    """The rates of a target at a precision, losses included; None where its profile knows no peak for it.

    At :func:`counted_as` its precision.
    """
    precision = counted_as(precision)
    peak = getattr(target.peak, precision)
    if peak is None:
        return None
    row = EFFICIENCY.get(compiler, _UNKNOWN)
    unit = peak / getattr(target.arch, "cores", 1) if row.cores == "one" else peak
    rates = {"conv": unit * row.conv, "matmul": unit * row.matmul, "other": unit * row.other}
    return Machine(rates, target.memory.bandwidth * row.memory, FLOAT_BYTES[precision], row.overhead)


def record_measurement(measurement: Measurement, *, evidence: str, home: Path | None = None) -> None:
    """Keep a measured latency; a later one of the same variant and batch takes its place.

    Raises:
        InputError: it was not measured on a device (an emulator's time says nothing), or is no positive time.
    """
    if evidence != "device":
        raise InputError(f"a latency with the evidence {evidence} corrects nothing", fix="measure it on the device")
    if not (measurement.measured > 0 and measurement.estimated > 0):
        raise InputError("a latency must be above 0 seconds", where=f"target {measurement.target}")
    with _locked(home) as path:
        kept = [each for each in _read(path) if _identity(each) != _identity(measurement)]
        entries = [asdict(each) for each in (*kept, measurement)]
        write_atomically(path, json.dumps({"schema": 1, "measurements": entries}, indent=1).encode())


def factor_for(target: str, compiler: str, precision: str, *, home: Path | None = None) -> Factor:
    """The correction for a target, compiler and precision; of the other precisions where this one was not measured."""
    found = [each for each in _read(_path(home)) if (each.target, each.compiler) == (target, compiler)]
    same = [each for each in found if each.precision == precision]
    chosen = same or found
    if not chosen:
        return Factor()
    ratios = [each.measured / each.estimated for each in chosen]
    errors = [
        abs(median(ratios[:index] + ratios[index + 1 :]) / ratio - 1) for index, ratio in enumerate(ratios)
    ] if len(ratios) > 1 else []  # fmt: skip
    scope = "target, compiler and precision" if same else "target and compiler"
    return Factor(median(ratios), len(ratios), median(errors) if errors else None, scope)


def _identity(each: Measurement) -> tuple[Any, ...]:
    return each.target, each.compiler, each.precision, each.model, each.batch


def _path(home: Path | None) -> Path:
    return (home or default_home()) / "measurements.json"


@contextmanager
def _locked(home: Path | None) -> Iterator[Path]:
    path = _path(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        yield path


def _read(path: Path) -> list[Measurement]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["measurements"]
        return [Measurement(**entry) for entry in entries]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the measured latencies cannot be read: {error}", where=str(path), fix="remove the file"
        ) from error
