"""What the steps do in child processes: dict in, dict out, files by path. Imports numpy and onnx."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from modelforge.errors import UnsupportedError

Request = dict[str, Any]

HALF_SAMPLES = 16
"""Calibration samples that say whether FP16 is near enough: the first ones, each an FP32 forward and one rounded."""


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
    if "ranges" in request:
        return quantize(model, folder, request, request["exclude"], request.get("samples"))
    if request["precision"] == "fp32":
        for path in model.parent.iterdir():
            shutil.copyfile(path, folder / path.name)
        return {}
    if request["precision"] == "fp16":
        return _to_half(model, folder, model, request["half_ranges"], request.get("samples"), request.get("floor_db"))
    raise UnsupportedError(f"there is no lowering to {request['precision']}")


def calibrate(request: Request) -> dict[str, Any]:
    """Ranges of every activation that a dialect may quantize."""
    table = _measure(Path(request["model"]), Path(request["samples"]), request["data_digest"])
    Path(request["out"]).write_text(table.to_json(), encoding="utf-8")
    return {"tensors": len(table.tensors), "samples": table.samples}


def _measure(model: Path, samples: Path, data_digest: str) -> Any:
    """Ranges of all activations: FP16 must know what overflows, wherever it is. By channel where equalization looks."""
    from modelforge.quantize.calibrate import calibrate as calibrate_model
    from modelforge.quantize.equalize import weighted_inputs
    from modelforge.quantize.half import float_activations

    tensors = float_activations(model)
    channels = [name for name in weighted_inputs(model) if name in set(tensors)]
    return calibrate_model(model, samples, tensors=tensors, channels=channels, data_digest=data_digest)


def rank(request: Request) -> dict[str, Any]:
    from modelforge.quantize.sensitivity import rank_layers

    found = rank_layers(
        Path(request["model"]),
        _ranges(request["ranges"]),
        Path(request["samples"]),
        dialect=request["dialect"],
        method=request["method"],
        reduce_range=request["reduce_range"],
    )
    return {"ranking": found.facts(), "blocks": [list(block) for block in found.blocks]}


def search(request: Request) -> dict[str, Any]:
    """The fewest layers to keep in float; see :mod:`modelforge.forge.searching`."""
    from modelforge.forge.searching import search_layers

    return search_layers(request)


def quantize(
    model: Path, folder: Path, request: Request, exclude: Collection[str], samples: str | None = None
) -> dict[str, Any]:
    """Prepared model -> QDQ in the request's dialect, its float rest in the dialect's own precision.

    With calibration samples, of several ways (clipping, equalization, bias correction) the one nearest to FP32 on them.
    """
    from modelforge.quantize.dialects import get_dialect
    from modelforge.quantize.dialects.tensorrt import merge_casts
    from modelforge.quantize.improve import quantize_best
    from modelforge.quantize.qdq import quantize_model

    dialect = get_dialect(request["dialect"])
    half = dialect.remainder == "fp16"
    out = folder / "fp32-rest" if half or dialect.native else folder
    table = _ranges(request["ranges"])
    how: dict[str, Any] = {"dialect": dialect.name, "exclude": exclude, "reduce_range": request["reduce_range"]}
    facts: dict[str, Any] = {}
    if samples is None:
        facts["quantize"] = asdict(quantize_model(model, table, out, method=request["method"], **how))
    else:
        best = quantize_best(
            model,
            table,
            out,
            methods=("auto", "minmax") if request["method"] == "auto" else (request["method"],),
            feeds=lambda: _feeds(model, Path(samples)),
            calibrate=lambda path: _measure(path, Path(samples), table.data_digest),
            **how,
        )
        facts = asdict(best)
    if half:
        import shutil

        halved = folder / "fp16-rest"
        facts |= _to_half(out / "model.onnx", halved, model, request["ranges"])
        # A Cast between Q/DQ and a layer would hide from the compiler what it makes an INT8 kernel of.
        facts["merged_casts"] = merge_casts(halved / "model.onnx", folder)
        for rest in (out, halved):
            shutil.rmtree(rest)
    if dialect.native is not None:
        import shutil

        from modelforge.quantize.half import overflowing

        facts |= dialect.native(out / "model.onnx", folder, overflowing(model, _ranges(request["ranges"])))
        shutil.rmtree(out)
    return facts


def _feeds(model: Path, samples: Path, step: int = 8) -> Iterator[dict[str, Any]]:
    """The samples as the model takes them: some together where its first dimensions are free, else one at a time."""
    import onnx

    from modelforge.samples import is_batched, stream_samples

    graph = onnx.load(model, load_external_data=False).graph
    known = {tensor.name for tensor in graph.initializer}
    shapes = {
        value.name: tuple(size.dim_value or size.dim_param or "?" for size in value.type.tensor_type.shape.dim)
        for value in graph.input
        if value.name not in known
    }
    free = all(shape and isinstance(shape[0], str) for shape in shapes.values())
    for _, rows in stream_samples(samples, list(shapes), step if free else 1):
        yield {name: array if is_batched(shapes[name]) else array[0, ...] for name, array in rows.items()}


def _to_half(
    model: Path, folder: Path, prepared: Path, ranges: str, samples: str | None = None, floor_db: float | None = None
) -> dict[str, Any]:
    """FP16 but for the nodes whose values, by the ranges of the prepared model, FP16 cannot hold.

    With calibration samples, but for those as well without which an output stays below 45 dB, or what the recipe asks.
    """
    from modelforge.graph.fp16 import convert_fp16
    from modelforge.quantize.half import overflowing
    from modelforge.quantize.half_search import WANTED_DB, search_half
    from modelforge.verify.gate import FLOORS

    keep = overflowing(prepared, _ranges(ranges))
    report = asdict(convert_fp16(model, folder, keep_fp32=set(keep)))
    found = None
    if samples is not None:
        least = FLOORS["fp16"][0] if floor_db is None else floor_db
        feeds = islice(_feeds(model, Path(samples), 1), HALF_SAMPLES)
        found = search_half(prepared, feeds, keep=set(keep), wanted_db=max(WANTED_DB, least), least_db=least)
    if found is not None and found.kept:
        keep |= dict.fromkeys(found.kept, found.reason)
        report = asdict(convert_fp16(model, folder, keep_fp32=set(keep)))
    kept = {name: reason for name, reason in report["kept"].items() if "quantization scale" not in reason}
    facts = {**report, "kept": {**kept, **keep}}
    return {"fp16": facts if found is None else {**facts, "search": found.facts()}}


def emulate(request: Request) -> dict[str, Any]:
    """An FP16 model, or one with Ascend's own INT8 nodes, for ONNX Runtime with its rounding made explicit.

    ``model`` is None where it runs as it is; ``note`` says what was emulated if that is not FP16 alone.
    """
    from modelforge.graph.fp16_emulation import emulate_fp16
    from modelforge.quantize.ascend_emulation import NOTE, emulate_ascend, has_ascend_nodes

    model, folder = Path(request["model"]), Path(request["folder"])
    if has_ascend_nodes(model):
        return {"model": str(emulate_ascend(model, folder)), "note": NOTE}
    found = emulate_fp16(model, folder)
    return {"model": None if found is None else str(found)}


def _ranges(path: str) -> Any:
    from modelforge.quantize.ranges import RangeTable

    return RangeTable.from_json(Path(path).read_text(encoding="utf-8"), where="ranges.json")


def split(request: Request) -> dict[str, Any]:
    """The stages of a planned split; their manifest."""
    from modelforge.forge.splitting import write_stages

    manifest: dict[str, Any] = write_stages(request)["manifest"]
    return manifest


def feed(request: Request) -> dict[str, Any]:
    """Arrays out of several archives into one: the samples as a stage takes them.

    ``tensors``: name -> archive; ``transport``: how some cross from stage to stage; ``count``: the first so many
    samples; ``labels``: whether the labels of ``input`` go along.
    """
    import numpy as np

    from modelforge.forge.crossing import cross
    from modelforge.samples import LABEL

    wanted = dict(request["tensors"]) | ({LABEL: "input"} if request["labels"] else {})
    arrays = {}
    for archive in sorted(set(wanted.values())):
        with np.load(request["archives"][archive], allow_pickle=False) as found:
            for name in (each for each, source in wanted.items() if source == archive):
                if name == LABEL and name not in found.files:
                    continue
                array = found[name][: request.get("count")]
                way = request.get("transport", {}).get(name)
                arrays[name] = array if way is None else cross(array, way)
    write_arrays(Path(request["out"]), arrays)
    return {}


def transport(request: Request) -> dict[str, Any]:
    """How each float tensor crosses from stage to stage: its type, and for INT8 its scale from the range table."""
    from modelforge.forge.crossing import transport_of

    tables = {stage: _ranges(path) for stage, path in request["ranges"].items()}
    found = {}
    for name, stage in sorted(request["tensors"].items()):
        table = tables.get(stage)
        found[name] = transport_of(request["kind"], None if table is None else table.tensors[name])
    return {"tensors": found}


def estimate(request: Request) -> dict[str, Any]:
    """Milliseconds by batch size, by a roofline over the layers; see :mod:`modelforge.graph.roofline`."""
    from modelforge.forge.efficiency import counted_as, machine_for
    from modelforge.forge.placement import Load
    from modelforge.graph.split_graph import read_layers
    from modelforge.target import load_target

    shapes = {name: tuple(shape) for name, shape in request["inputs"].items()}
    symbols = {size for shape in shapes.values() for size in shape[:1] if isinstance(size, str)}
    machine = machine_for(load_target(Path(request["target"])), request["precision"], request["compiler"])
    method = "roofline of the target's profile over the layers, not corrected by any measurement"
    if machine is None:
        return {"by_batch": {}, "method": method}
    load = Load(read_layers(Path(request["model"]), dict.fromkeys(symbols, 1), shapes))
    open_batch = bool(symbols)
    times = {
        str(size): load.seconds(counted_as(request["precision"]), machine, size if open_batch else 1) * 1e3
        for size in request["batches"]
    }
    return {"by_batch": {size: float(f"{taken:.4g}") for size, taken in times.items()}, "method": method}


def placement(request: Request) -> dict[str, Any]:
    """Where the model can run, by estimate: one row a target, at batch 1. See :mod:`modelforge.forge.placement`."""
    from modelforge.forge.placement import placement_matrix
    from modelforge.graph.inspect import inspect_model
    from modelforge.graph.split_graph import read_layers
    from modelforge.target import parse_target

    model = Path(request["model"])
    shapes = {name: tuple(shape) for name, shape in request["inputs"].items()}
    symbols = {size for shape in shapes.values() for size in shape[:1] if isinstance(size, str)}
    targets = [parse_target(text, Path(f"{tag}.toml")) for tag, text in sorted(request["targets"].items())]
    # Not corrected by what this machine measured: the same inputs give the same bundle.
    matrix = placement_matrix(
        read_layers(model, dict.fromkeys(symbols, 1), shapes),
        inspect_model(model, shapes=shapes, cost=False),
        targets,
        budget_ms=request["budget_ms"],
        home=Path("/nonexistent"),
    )
    kept = ("precision", "verdict", "needed_bytes", "allowed_bytes", "latency_ms", "limit")
    rows = [
        {
            "target": row.target.tag,
            "tier": row.target.tier,
            "verdict": row.verdict,
            "precision": row.best.precision if row.best else None,
            "why": row.why,
            "estimates": [{name: getattr(each, name) for name in kept} for each in row.estimates],
        }
        for row in matrix.rows
    ]
    return {"budget_ms": matrix.budget_ms, "rows": rows}


def subset(request: Request) -> dict[str, Any]:
    """The inputs of the first ``count`` samples, without labels."""
    import numpy as np

    from modelforge.samples import LABEL

    with np.load(request["samples"], allow_pickle=False) as archive:
        arrays = {name: archive[name][: request["count"]] for name in archive.files if name != LABEL}
    write_arrays(Path(request["out"]), arrays)
    return {}


def baseline(request: Request) -> dict[str, Any]:
    """Check the FP32 reference against the user's metric, and put the golden samples aside."""
    from modelforge.verify.gate import check_baseline

    rules, metric = metric_of(request["metric"])
    reference = read_arrays(request["reference"])
    inputs, labels = read_samples(request["samples"])
    value = check_baseline(rules, metric, reference, labels)
    folder, count = Path(request["folder"]), request["golden"]
    for name, arrays in (("golden-inputs.npz", inputs), ("golden-outputs.npz", reference)):
        write_arrays(folder / name, {key: array[:count] for key, array in arrays.items()})
    return {"value": value, "samples": len(next(iter(inputs.values())))}


def judge(request: Request) -> dict[str, Any]:
    from modelforge.verify.gate import judge as judge_outputs

    rules, metric = metric_of(request["metric"])
    count = request["count"]
    reference = {name: array[:count] for name, array in read_arrays(request["reference"]).items()}
    _, labels = read_samples(request["samples"])
    value = read_arrays(request["value"])
    labels = None if labels is None else labels[:count]
    groups = groups_of(request["models"], reference)
    verdict = judge_outputs(rules, metric, request["precision"], reference, value, labels, groups)
    return {"metric": rules.metric, "max_drop": rules.max_drop, **verdict.facts()}


def groups_of(models: Iterable[str], reference: Mapping[str, Any]) -> list[Any]:
    """The channel groups of the outputs that these models give, where the arrays are what their graphs say."""
    from modelforge.graph.output_groups import find_output_groups
    from modelforge.verify.metrics import ChannelGroup

    found: dict[str, list[Any]] = {}
    for group in (group for model in models for group in find_output_groups(Path(model))):
        shape = reference[group.output].shape if group.output in reference else ()
        axis = group.axis + len(shape) - group.rank  # the axis of samples stands before where the model has no batch
        if len(shape) - group.rank in (0, 1) and axis > 0 and group.stop <= shape[axis]:
            told = ChannelGroup(group.output, group.name, axis, group.start, group.stop, group.alike)
            found.setdefault(group.output, []).append(told)
    whole = {name: groups[-1].stop == reference[name].shape[groups[-1].axis] for name, groups in found.items()}
    return [group for name, groups in found.items() if whole[name] for group in groups]


def metric_of(facts: Mapping[str, Any]) -> tuple[Any, Any]:
    from modelforge.verify.gate import GateRules
    from modelforge.verify.metrics import label_metric

    rules = GateRules(**facts["rules"])
    where = "accuracy.metric"
    metric = label_metric(rules.metric, k=facts["k"], output=facts["output"], folder=Path(facts["folder"]), where=where)
    return rules, metric


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    import numpy as np

    with path.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def read_arrays(path: str) -> dict[str, Any]:
    import numpy as np

    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def read_samples(path: str) -> tuple[dict[str, Any], Any]:
    from modelforge.samples import LABEL

    arrays = read_arrays(path)
    return {name: array for name, array in arrays.items() if name != LABEL}, arrays.get(LABEL)


def compare_golden(request: Request) -> dict[str, Any]:
    """Outputs beside the golden ones, by the floors of the precision: golden samples are too few for a label metric.

    ``models``: the lowered ones that give the outputs, for their channel groups. Scores that are silent in the golden
    samples say nothing there, as of a picture without any object.
    """
    from modelforge.verify.gate import GateRules
    from modelforge.verify.gate import judge as judge_outputs
    from modelforge.verify.metrics import is_silent

    rules = GateRules(metric="sqnr", max_drop=None)
    reference, value = read_arrays(request["reference"]), read_arrays(request["value"])
    groups = [
        group
        for group in groups_of(request.get("models", ()), reference)
        if not is_silent(group, reference[group.output])
    ]
    return judge_outputs(rules, None, request["precision"], reference, value, None, groups).facts()


def describe(request: Request) -> dict[str, Any]:
    """calibration.json and sensitivity.json, as docs/guides/report.md gives their shape."""
    from modelforge.quantize.dialects import get_dialect
    from modelforge.store import canonical_json

    table = _ranges(request["ranges"])
    smallest, largest = get_dialect(request["dialect"]).bounds
    tensors = []
    for name, parameters in sorted(request["quantize"]["tensors"].items()):
        if name not in table.tensors:
            continue
        found = table.tensors[name]
        scale, zero_point = parameters["scale"], parameters["zero_point"]
        low, high = (smallest - zero_point) * scale, (largest - zero_point) * scale
        tensors.append(
            {
                "name": name, "minimum": found.minimum, "maximum": found.maximum, "low": low, "high": high,
                "zeros": found.zeros, "bins": _coarse(found.bins),
            }
        )  # fmt: skip
    calibration = {
        "schema": 1, "samples": table.samples, "data_digest": table.data_digest,
        "method": request["quantize"]["method"], "tensors": tensors,
    }  # fmt: skip
    search = request["search"]
    sensitivity = {
        "schema": 1, "metric": request["metric"], "ranking": request["ranking"],
        "curve": search["curve"] if search else [], "chosen": search["chosen"] if search else None,
    }  # fmt: skip
    folder = Path(request["folder"])
    (folder / "calibration.json").write_bytes(canonical_json(calibration))
    (folder / "sensitivity.json").write_bytes(canonical_json(sensitivity))
    return {}


def _coarse(histogram: Any, bins: int = 64) -> dict[str, Any]:
    """A histogram in few bins: enough for a picture."""
    import numpy as np

    counts, edges = np.histogram(histogram.centers, bins=bins, weights=histogram.counts)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": [int(count) for count in counts]}
