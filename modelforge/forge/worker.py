"""What the steps do in child processes: dict in, dict out, files by path. Imports numpy and onnx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modelforge.errors import UnsupportedError

Request = dict[str, Any]


def prepare(request: Request) -> dict[str, Any]:
    from modelforge.graph.prepare import prepare as prepare_model

    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {name: tuple(shape) for name, shape in request["inputs"].items()}
    return asdict(prepare_model(Path(request["model"]), folder, inputs, sizes=request["sizes"]))


def lower(request: Request) -> dict[str, Any]:
    """FP32 is the prepared model as it stands."""
    import shutil

    model, folder = Path(request["model"]), Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if request["precision"] == "fp32":
        for path in model.parent.iterdir():
            shutil.copyfile(path, folder / path.name)
        return {}
    if request["precision"] == "fp16":
        from modelforge.graph.fp16 import convert_fp16

        return asdict(convert_fp16(model, folder))
    raise UnsupportedError(f"there is no lowering to {request['precision']}")


def subset(request: Request) -> dict[str, Any]:
    """The inputs of the first ``count`` samples, without labels."""
    import numpy as np

    from modelforge.samples import LABEL

    with np.load(request["samples"], allow_pickle=False) as archive:
        arrays = {name: archive[name][: request["count"]] for name in archive.files if name != LABEL}
    with Path(request["out"]).open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    return {}


def baseline(request: Request) -> dict[str, Any]:
    """Check the FP32 reference against the user's metric, and put the golden samples aside."""
    import numpy as np

    from modelforge.verify.gate import check_baseline

    rules, metric = _metric(request["metric"])
    reference = _load(request["reference"])
    inputs, labels = _samples(request["samples"])
    value = check_baseline(rules, metric, reference, labels)
    folder, count = Path(request["folder"]), request["golden"]
    for name, arrays in (("golden-inputs.npz", inputs), ("golden-outputs.npz", reference)):
        with (folder / name).open("wb") as stream:
            np.savez(stream, allow_pickle=False, **{key: array[:count] for key, array in arrays.items()})
    return {"value": value, "samples": len(next(iter(inputs.values())))}


def judge(request: Request) -> dict[str, Any]:
    from modelforge.verify.gate import judge as judge_outputs

    rules, metric = _metric(request["metric"])
    count = request["count"]
    reference = {name: array[:count] for name, array in _load(request["reference"]).items()}
    _, labels = _samples(request["samples"])
    value = _load(request["value"])
    verdict = judge_outputs(
        rules, metric, request["precision"], reference, value, None if labels is None else labels[:count]
    )
    return {"metric": rules.metric, "max_drop": rules.max_drop, **verdict.facts()}


def _metric(facts: Mapping[str, Any]) -> tuple[Any, Any]:
    from modelforge.verify.gate import GateRules
    from modelforge.verify.metrics import label_metric

    rules = GateRules(**facts["rules"])
    where = "accuracy.metric"
    metric = label_metric(rules.metric, k=facts["k"], output=facts["output"], folder=Path(facts["folder"]), where=where)
    return rules, metric


def _load(path: str) -> dict[str, Any]:
    import numpy as np

    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _samples(path: str) -> tuple[dict[str, Any], Any]:
    from modelforge.samples import LABEL

    arrays = _load(path)
    return {name: array for name, array in arrays.items() if name != LABEL}, arrays.get(LABEL)


def compare_golden(request: Request) -> dict[str, Any]:
    """Outputs beside the golden ones, by the floors of the precision: golden samples are too few for a label metric."""
    from modelforge.verify.gate import GateRules
    from modelforge.verify.gate import judge as judge_outputs

    rules = GateRules(metric="sqnr", max_drop=None)
    verdict = judge_outputs(
        rules, None, request["precision"], _load(request["reference"]), _load(request["value"]), None
    )
    return verdict.facts()
