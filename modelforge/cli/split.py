"""`modelforge split`: cut a model into stages that run one after the other, on one machine or on several."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelforge.cli.console import Console, size_text

if TYPE_CHECKING:
    from modelforge.forge.splitting import Planned, SplitWish

DESCRIPTION = """Cut a model into stages: one ONNX file each, and split.json, which says what goes from where to where.
The chain of stages is run against the whole model before the folder appears.

Where to cut, one of:
  --at a,b;c            at these tensors: a and b together are the first cut, c is the second
  --stages N            into parts alike in --balance flops, bytes or time
  --max-stage-bytes N   into as few parts as fit (1.5GiB, 200MB)
  --tier, --link        over device, edge and cloud, for the least time of one inference; or --devices FILE.toml"""
EXAMPLE = (
    "modelforge split model.onnx --tier device=cortex-a76 --tier cloud=a100:fp16 --link device-cloud=10ms,1.25MB/s "
    "--transport int8 --plan-only"
)
_CHECK_SAMPLES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path)
    where = parser.add_argument_group("where to cut")
    where.add_argument("--at", action="append", default=[], metavar="TENSORS", help="tensor[,tensor][;tensor...]")
    where.add_argument("--stages", type=int, metavar="N")
    where.add_argument("--balance", default="flops", metavar="BY", help="flops, bytes or time; default flops")
    where.add_argument("--target", metavar="TAG", help="for --balance time: estimate on this target")
    where.add_argument("--profile", type=Path, metavar="FILE", help="for --balance time: JSON, milliseconds by node")
    where.add_argument("--max-stage-bytes", metavar="SIZE", help="of a stage's weights")
    where.add_argument("--activations", action="store_true", help="count live activations in --max-stage-bytes too")
    tiers = parser.add_argument_group("tiers and links")
    tiers.add_argument("--tier", action="append", default=[], metavar="TIER=TAG[:PRECISION]", help="two or three")
    tiers.add_argument("--link", action="append", default=[], metavar="TIER-TIER=LATENCY,BANDWIDTH")
    tiers.add_argument("--devices", type=Path, metavar="FILE", help="tiers and links from a TOML file")
    tiers.add_argument("--transport", metavar="PRECISION", help="send floats as fp32 (default), fp16 or int8")
    tiers.add_argument("--keep-outputs", action="store_true", help="outputs stay where they are made")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: MODEL-stages")
    parser.add_argument("--size", action="append", default=[], metavar="NAME=N", help="size of an open dimension")
    parser.add_argument("--shape", action="append", default=[], metavar="NAME=SIZES", help="shape of an input")
    parser.add_argument("--data", metavar="DATA", help="run the chain on these samples instead of random inputs")
    parser.add_argument("--plan-only", action="store_true", help="show the plan and other places to cut; write nothing")
    parser.add_argument("--no-verify", action="store_true", help="do not run the chain against the whole model")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.cli.matrix import sizes
    from modelforge.cli.quantize import shapes
    from modelforge.forge.intake import require_build_extra

    require_build_extra()
    from modelforge.forge.split_choices import candidates, tier_choices
    from modelforge.forge.splitting import plan_stages
    from modelforge.graph.load import check_model
    from modelforge.target import Registry

    check_model(args.model)
    wish = _wish(args)
    given = shapes(args.shape)
    planned = plan_stages(args.model, wish, Registry(), sizes=sizes(args.size), shapes=given)
    document = _document(planned)
    lines = _Lines(console, planned)
    problem = None
    if wish.tiers is not None:
        from modelforge.forge.tiers import tier_problem

        problem = tier_problem(planned.graph, wish.tiers, Registry())
        document["tiers"] = tier_choices(problem)
    elif args.plan_only:
        document["candidates"] = candidates(planned)
    if not args.plan_only:
        folder = args.output or Path(f"{args.model.stem}-stages")
        document |= {"path": str(folder), "check": _write(args, planned, folder, console)}
    console.result(document)
    lines.stages()
    if problem is not None:
        lines.tiers(document["tiers"])
    if "candidates" in document:
        lines.candidates(document["candidates"])
    for note in (*planned.notes, *planned.plan.notes):
        console.note(f"note: {note}")
    if "check" in document:
        lines.check(document["check"], document["path"])
    return 0


def _wish(args: argparse.Namespace) -> SplitWish:
    from modelforge.errors import InputError
    from modelforge.forge.splitting import SplitWish
    from modelforge.forge.tiers import setup_from_file, setup_from_options

    tiers = None
    if args.devices is not None:
        if args.tier or args.link or args.transport or args.keep_outputs:
            raise InputError(
                "the devices file says these already: --tier, --link, --transport, --keep-outputs",
                where="--devices",
                fix="change them in the file",
            )
        tiers = setup_from_file(args.devices)
    elif args.tier or args.link:
        tiers = setup_from_options(args.tier, args.link, args.transport or "fp32", return_outputs=not args.keep_outputs)
    cuts = [tuple(name for name in cut.split(",") if name) for text in args.at for cut in text.split(";") if cut]
    limit = None if args.max_stage_bytes is None else _bytes(args.max_stage_bytes)
    return SplitWish(
        at=tuple(cuts),
        stages=args.stages,
        balance=args.balance,
        time_on=args.target,
        profile=args.profile,
        max_stage_bytes=limit,
        activations=args.activations,
        tiers=tiers,
    )


def _bytes(text: str) -> int:
    import re

    from modelforge.errors import InputError

    found = re.fullmatch(r"([0-9.]+)\s*([kKMG]i?)?B?", text.strip())
    try:
        if found is None:
            raise ValueError(text)
        scale = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "ki": 2**10, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
        return int(float(found[1]) * scale[found[2] or ""])
    except ValueError:
        raise InputError(f'"{text}" is no size', where="--max-stage-bytes", fix="for example 200MB or 1.5GiB") from None


def _write(args: argparse.Namespace, planned: Planned, folder: Path, console: Console) -> dict[str, Any]:
    """Write the stages; what the check of the chain found, or why there was none."""
    from modelforge.forge.splitting import chain_check, split_model

    reason = "--no-verify" if args.no_verify else ""
    if not reason:
        size = sum(planned.graph.weights[name].bytes for name in planned.graph.weights)
        available = _available_memory()
        # The session holds the weights, and while it loads a second copy of them.
        if 2 * size > available:
            reason = f"the model takes {size_text(size)}, and {size_text(available)} of memory are free"
    if reason:
        split_model(args.model, planned.plan, folder)
        return {"data": "none", "reason": f"not run: {reason}"}
    console.note("running the chain of stages against the whole model")
    with chain_check(args.model, planned.plan, data=args.data, samples=_CHECK_SAMPLES) as check:
        return dict(split_model(args.model, planned.plan, folder, check))


def _available_memory() -> int:
    """Bytes, as Linux says; without a word of it, enough for any model."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 1 << 62


def _document(planned: Planned) -> dict[str, Any]:
    from modelforge.graph.split_tiers import TRANSPORTS
    from modelforge.graph.split_write import describe

    tensors = planned.graph.tensors
    return {
        **{key: value for key, value in describe(planned.plan).items() if key != "schema"},
        "crossing": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "from": tensor.source,
                "to": list(tensor.readers),
                "bytes": {each: tensors[tensor.name].transport_bytes(each) for each in TRANSPORTS},
            }
            for tensor in planned.plan.crossing
        ],
        "notes": [*planned.notes, *planned.plan.notes],
    }


class _Lines:
    """Prints what was planned, in tables."""

    def __init__(self, console: Console, planned: Planned) -> None:
        self.console, self.planned = console, planned

    def stages(self) -> None:
        plan, tensors = self.planned.plan, self.planned.graph.tensors
        self.console.table(
            ["stage", "layers", "GFLOP", "weights", "activations", "estimated"],
            [
                [
                    stage.name, str(stage.layers), f"{stage.flops / 1e9:.3f}", size_text(stage.weight_bytes),
                    size_text(stage.activation_bytes),
                    "-" if stage.seconds is None else f"{stage.seconds * 1e3:.2f} ms",
                ]
                for stage in plan.stages
            ],
        )  # fmt: skip
        if plan.crossing:
            self.console.text("")
            self.console.table(
                ["crossing tensor", "type", "shape", "from", "to", "fp32", "fp16", "int8"],
                [
                    [
                        tensor.name, tensor.dtype, _shape(tensor.shape), tensor.source, ", ".join(tensor.readers),
                        *(_size(tensors[tensor.name].transport_bytes(each)) for each in ("fp32", "fp16", "int8")),
                    ]
                    for tensor in plan.crossing
                ],
            )  # fmt: skip

    def tiers(self, document: Mapping[str, Any]) -> None:
        columns = [*document["cuts"][0]["tier_ms"]]
        self.console.text("\nthe fastest ways, estimated, in ms (sent as " + document["transport"] + ")")
        self.console.table(
            ["way", "sent", "fp32", "fp16", "int8", *columns, "links", "total", "at fp32/fp16/int8", ""],
            [
                [
                    cut["kind"], _names(cut["crossing"]), *(size_text(size) for size in cut["bytes"].values()),
                    *(f"{cut['tier_ms'][name]:.2f}" for name in columns), f"{sum(cut['link_ms'].values()):.2f}",
                    f"{cut['total_ms']:.2f}", " / ".join(f"{taken:.2f}" for taken in cut["total_ms_at"].values()),
                    "" if cut["fits"] else "does not fit",
                ]
                for cut in document["cuts"]
            ],
        )  # fmt: skip
        self.console.text("\nhow the choice depends on bandwidth")
        first = document["links"][0]
        self.console.table(
            [f"{first['from']}-{first['to']}", "best way", "sent", "bytes sent", "total ms"],
            [
                [
                    f"{size_text(first['bandwidth'] * each['factor'])}/s", each["kind"], _names(each["crossing"]),
                    size_text(each["bytes"][document["transport"]]), f"{each['total_ms']:.2f}",
                ]
                for each in document["sweep"]
            ],
        )  # fmt: skip

    def candidates(self, found: list[dict[str, Any]]) -> None:
        self.console.text("\nother places to cut, fewest bytes first")
        self.console.table(
            ["--at", "FLOPs before", "fp32", "fp16", "int8"],
            [
                [
                    ",".join(each["tensors"]), f"{each['flops_before']:.1%}",
                    *(size_text(size) for size in each["bytes"].values()),
                ]
                for each in found
            ],
        )  # fmt: skip

    def check(self, check: Mapping[str, Any], path: str) -> None:
        if check["data"] == "none":
            self.console.text(f"\n{path}: written; the chain was {check['reason']}")
            return
        inputs = f"{check['samples']} {'random, seeded inputs' if check['data'] == 'random' else 'given samples'}"
        equal = "equals the whole model bit by bit" if check["identical"] else (
            f"differs from the whole model by at most {check['max_abs']:.3g} (output {check['output']})"
        )  # fmt: skip
        self.console.text(f"\n{path}: the chain {equal} on {inputs}, in ONNX Runtime with graph optimisation off")


def _names(crossing: Mapping[str, list[str]]) -> str:
    names = dict.fromkeys(name for each in crossing.values() for name in each)
    shown = ", ".join(list(names)[:3])
    return (shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "-"


def _shape(shape: tuple[int | str, ...] | None) -> str:
    return "?" if shape is None else "[" + ", ".join(map(str, shape)) + "]"


def _size(size: int | None) -> str:
    return "?" if size is None else size_text(size)
