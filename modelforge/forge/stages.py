"""The stages of a model, and the steps that serve all variants of a stage. An unsplit model is the stage ``main``.

A stage of a split model goes the way of a whole one: its inputs are what the stages before it give in FP32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelforge.forge.intake import GRAPH_TOOLS, Intake, Shapes, package_version
from modelforge.forge.step import Source, Step
from modelforge.graph.facts import ModelFacts

TIMEOUT = 3600.0
"""Seconds that any one child process may take."""


@dataclass(frozen=True)
class Onward:
    """How the model's outputs come from what a stage gives, all else in FP32: what the stage's precision must serve.

    Attributes:
        stages: those after it, in order, each prepared, with where its tensors come from: ``input`` or a stage.
        before: by name, the FP32 outputs of the stages before it that are read after it.
        outputs: (name, stage).
        samples, reference, metric, metric_needs: those of the whole model.
    """

    stages: tuple[tuple[str, Step, Mapping[str, str]], ...]
    before: Mapping[str, Step]
    outputs: tuple[tuple[str, str], ...]
    samples: Step | Source
    reference: Step
    metric: Mapping[str, Any]
    metric_needs: Mapping[str, Source]

    def params(self) -> dict[str, Any]:
        """JSON; the needs go by the same names."""
        stages = [{"name": name, "tensors": dict(tensors)} for name, _, tensors in self.stages]
        return {"stages": stages, "outputs": [list(each) for each in self.outputs], "metric": dict(self.metric)}

    def needs(self) -> dict[str, Step | Source]:
        needs: dict[str, Step | Source] = {f"onward-{name}": prepare for name, prepare, _ in self.stages}
        needs |= {f"from-{name}": reference for name, reference in self.before.items()}
        return {**needs, "whole-samples": self.samples, "whole-reference": self.reference, **self.metric_needs}


@dataclass(frozen=True)
class Stage:
    """One part of the model, and what serves all its variants.

    Attributes:
        inputs: shape by input name; a string is a symbol bounded in the recipe's dims.
        samples: the evaluation data, at this stage's inputs.
        calibration: the calibration data, at this stage's inputs; None where the recipe has none.
        metric: what a variant of this stage is judged by: rules, k, output.
        prepare: gives the FP32 model that everything is lowered from.
        reference: gives the FP32 outputs on the samples.
        baseline: holds them against the metric, and gives the golden samples.
        onward: None for a stage that gives all outputs of the model.
    """

    name: str
    facts: ModelFacts
    inputs: Shapes
    samples: Step | Source
    calibration: Step | Source | None
    metric: Mapping[str, Any]
    metric_needs: Mapping[str, Source]
    prepare: Step
    reference: Step
    baseline: Step
    onward: Onward | None = None

    def titled(self, title: str) -> str:
        """A step's title; names the stage of a split model."""
        return title if self.name == "main" else f"{self.name}: {title}"


def whole(intake: Intake) -> Stage:
    """The single stage of a model that is not split."""
    model = intake.recipe.model.name
    prepare, reference = front_steps(intake, "main", intake.model, model, intake.inputs, intake.samples)
    metric = metric_of(intake)
    needs: dict[str, Source] = {} if intake.metric is None else {"metric": intake.metric}
    baseline = make_step(
        "baseline",
        "check the FP32 baseline",
        {"metric": metric},
        {"samples": intake.samples, "reference": reference, **needs},
    )
    return Stage(
        "main", intake.facts, intake.inputs, intake.samples, intake.calibration, metric, needs, prepare, reference,
        baseline,
    )  # fmt: skip


def metric_of(intake: Intake) -> dict[str, Any]:
    """The recipe's own metric and rules, as the steps want them."""
    accuracy = intake.accuracy
    rules = accuracy.model_dump(include={"metric", "max_drop", "min_reference", "min_agreement", "min_sqnr_db"})
    return {"rules": rules, "k": accuracy.k, "output": accuracy.output}


def make_step(
    name: str,
    title: str,
    params: Mapping[str, Any],
    needs: Mapping[str, Step | Source],
    tools: Mapping[str, str] | None = None,
) -> Step:
    """A step of :mod:`modelforge.forge.steps`, or of ``split_steps``; ``tools`` are the graph tools unless given."""
    from modelforge.forge import split_steps, steps

    module = split_steps if name in split_steps.CODE_VERSIONS else steps
    return Step(
        name=name,
        title=title,
        function=f"{module.__name__}:{name}",
        code_version=module.CODE_VERSIONS[name],
        params={**params, "timeout": TIMEOUT},
        tools={package: package_version(package) for package in GRAPH_TOOLS} if tools is None else tools,
        needs=needs,
    )


def front_steps(
    intake: Intake, name: str, source: Step | Source, model: str, inputs: Shapes, samples: Step | Source
) -> tuple[Step, Step]:
    """The steps that prepare a stage's model, and run it as it came."""
    shapes = {each: list(shape) for each, shape in inputs.items()}
    sizes = {symbol: dim.usual for symbol, dim in intake.recipe.dims.items()}
    prefix = "" if name == "main" else f"{name}: "
    prepare = make_step(
        "prepare", prefix + "prepare the model", {"model": model, "inputs": shapes, "sizes": sizes}, {"model": source}
    )
    reference = make_step(
        "reference",
        prefix + "run the FP32 reference",
        {"model": model, "batch": intake.batch},
        {"model": source, "samples": samples},
    )
    return prepare, reference
