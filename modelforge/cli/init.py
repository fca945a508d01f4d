"""`modelforge init`: a recipe for a model."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from modelforge.cli.console import Console

if TYPE_CHECKING:
    from modelforge.graph.facts import ModelFacts

DESCRIPTION = """Write a recipe for a model: its inputs with their dynamic dimensions named, and places to fill in for
the data. An existing recipe is not replaced."""
EXAMPLE = "modelforge init model.onnx --target t4 --target cortex-a76"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: recipe.toml beside the model")
    parser.add_argument("--target", action="append", default=[], metavar="TAG", help="default: x86-64")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.errors import InputError
    from modelforge.forge.intake import require_build_extra
    from modelforge.target import Registry

    require_build_extra()
    from modelforge.graph.inspect import inspect_model
    from modelforge.graph.load import check_model

    check_model(args.model)
    registry = Registry()
    targets = [registry.get(tag, where="--target") for tag in args.target or ["x86-64"]]
    path = args.output or args.model.parent / "recipe.toml"
    facts = inspect_model(args.model, cost=False)
    model = os.path.relpath(args.model, path.parent)
    ladders = {target.tag: "fp16" if target.arch.kind == "cuda" else "fp32" for target in targets}
    text = recipe_text(facts, model, ladders)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise InputError("exists already, and is left as it is", where=str(path), fix="give another -o FILE") from None
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(path)) from error
    console.result({"path": str(path), "recipe": text}, f"{path}: fill in [accuracy], then `modelforge plan {path}`")
    return 0


def recipe_text(facts: ModelFacts, model: str, ladders: dict[str, str]) -> str:
    """The text of a recipe; every dynamic dimension gets a symbol with bounds to adjust."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(model).stem.lower()).strip("-") or "model"
    inputs: list[str] = []
    symbols: dict[str, None] = {}
    for tensor in facts.inputs:
        shape: list[int | str] = []
        for axis, size in enumerate(tensor.shape or ()):
            symbol = size
            if isinstance(size, str):
                known = re.sub(r"\W+", "_", size).strip("_")
                symbol = known or (
                    "batch" if axis == 0 else f"{re.sub(r'[^a-z0-9]+', '_', tensor.name.lower())}_{axis}"
                )
                symbols[symbol] = None
            shape.append(symbol)
        note = "" if tensor.shape is not None else "     # the model does not say its rank: fill it in"
        inputs.append(f"[inputs.{json.dumps(tensor.name)}]     # {tensor.dtype}\nshape = {json.dumps(shape)}{note}\n")
    dims = "".join(f"{symbol} = {{ min = 1, opt = 4, max = 8 }}     # adjust\n" for symbol in symbols)
    targets = "".join(f'[[target]]\ntag = "{tag}"\nprecision = ["{rung}"]\n\n' for tag, rung in ladders.items())
    return (
        f'schema = 1\nname = "{name}"\nversion = "0.1.0"\n\n[model]\npath = {json.dumps(model)}\n\n'
        + "\n".join(inputs)
        + (f"\n[dims]\n{dims}" if symbols else "")
        + "\n# The gate. The data: arrays by input name, samples first; and an array `label` where there are labels.\n"
        '[accuracy]\ndata = "evaluation.npz"\nmetric = "cosine"     # or "top1" with labels, or "module:function"\n'
        "max_drop = 0.01\n\n" + targets.rstrip() + "\n"
    )
