"""What comes into a build from outside: the recipe, the model and the data, read and held against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelforge.errors import DataError, RecipeError, ToolchainMissing, nearest
from modelforge.forge.step import Source
from modelforge.graph.facts import ModelFacts, TensorFacts
from modelforge.recipe import AccuracySection, Recipe
from modelforge.store import digest_file

if TYPE_CHECKING:
    from modelforge.samples import Samples

GRAPH_TOOLS = ("onnx", "onnx-ir", "onnxsim", "onnxruntime")
Shapes = Mapping[str, tuple[int | str, ...]]


@dataclass(frozen=True)
class Intake:
    """Everything from outside, checked.

    Attributes:
        inputs: shape by input name; a string is a symbol bounded in ``recipe.dims``.
        metric: the file of the user's own metric, where the recipe has one beside it.
        count: number of evaluation samples.
        calibration: the calibration data, where the recipe has some.
        calibration_facts: the ``calibration`` object of a variant record: number of samples, digest of the arrays.
    """

    recipe: Recipe
    accuracy: AccuracySection
    facts: ModelFacts
    inputs: Shapes
    model: Source
    samples: Source
    metric: Source | None
    count: int
    calibration: Source | None
    calibration_facts: Mapping[str, Any]

    @property
    def sources(self) -> tuple[Source, ...]:
        found = (self.model, self.samples, self.metric, self.calibration)
        return tuple(source for source in found if source is not None)

    @property
    def emulated(self) -> int:
        """How many samples must be judged in an emulator or simulator, however slow it is; 0 where nobody asked."""
        return min(self.count, self.accuracy.emulated or 0)

    @property
    def batch(self) -> int:
        """How many samples go through the model at once: the usual size of the first dimension, 1 where it is fixed."""
        firsts = [shape[0] for shape in self.inputs.values() if shape]
        symbols = [first for first in firsts if isinstance(first, str)]
        if not symbols or len(symbols) < len(firsts):
            return 1
        return min(self.recipe.dims[symbol].usual for symbol in symbols)


def take_in(recipe: Recipe) -> Intake:
    """Read and check the model and the data of a recipe.

    Raises:
        ModelError, RecipeError, DataError: one of them is wrong, or they do not fit together.
    """
    from modelforge.graph.inspect import inspect_model
    from modelforge.graph.load import check_model

    check_model(recipe.model)
    facts = inspect_model(recipe.model, cost=False)
    inputs = _input_shapes(recipe, facts)
    if recipe.accuracy is None:
        raise DataError(
            "the recipe has no [accuracy] section: without evaluation data nothing can be released",
            where=str(recipe.path),
            fix='add [accuracy] with `data`, `metric` ("top1" with labels, "cosine" without) and `max_drop`',
        )
    samples, calibration = _read_data(recipe, recipe.accuracy, facts, inputs)
    allowed = _check_calibration(recipe, calibration)
    return Intake(
        recipe=recipe,
        accuracy=recipe.accuracy,
        facts=facts,
        inputs=inputs,
        model=_model_source(recipe.model),
        samples=_samples_source("evaluation data", samples),
        metric=_metric_source(recipe, recipe.accuracy.metric),
        count=samples.count,
        calibration=_samples_source("calibration data", calibration) if calibration else None,
        calibration_facts=_calibration_facts(recipe, calibration, allowed) if calibration else {},
    )


def require_build_extra() -> None:
    """Raise ToolchainMissing where this is the deployer's install."""
    for package in ("numpy", *GRAPH_TOOLS):
        if package_version(package) == "":
            raise ToolchainMissing(
                f"{package} is not installed, and this command needs it",
                fix="pip install 'modelforge[build]' (plain `modelforge` is the deployer's install)",
            )


def package_version(package: str) -> str:
    """The installed version of a Python package, empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _input_shapes(recipe: Recipe, facts: ModelFacts) -> Shapes:
    """Every input's shape: the recipe's word, checked against the model's; static ones need no word."""
    known = {tensor.name: tensor for tensor in facts.inputs}
    for name in recipe.inputs:
        if name not in known:
            where = recipe.where("inputs", name)
            raise RecipeError(f'the model has no input "{name}"; {nearest(name, known)}', where=where)
    return {name: _input_shape(recipe, tensor) for name, tensor in known.items()}


def _input_shape(recipe: Recipe, tensor: TensorFacts) -> tuple[int | str, ...]:
    wanted = recipe.inputs.get(tensor.name)
    if wanted is None:
        sizes = tensor.shape or ()
        if tensor.shape is None or not all(isinstance(size, int) for size in sizes):
            shown = "of unknown rank" if tensor.shape is None else list(tensor.shape)
            raise RecipeError(
                f'the input "{tensor.name}" is dynamic in the model ({shown}), and the recipe does not say its shape',
                where=str(recipe.path),
                fix=f'add [inputs."{tensor.name}"] with shape = [...]: an int, or a symbol bounded under [dims]',
            )
        return tensor.shape
    where = recipe.where("inputs", tensor.name, "shape")
    if tensor.shape is None:
        return wanted
    if len(wanted) != len(tensor.shape):
        raise RecipeError(
            f"the model's input has {len(tensor.shape)} dimensions ({list(tensor.shape)}), "
            f"the recipe gives {len(wanted)}",
            where=where,
        )
    for axis, (ours, theirs) in enumerate(zip(wanted, tensor.shape, strict=True)):
        if isinstance(theirs, int) and ours != theirs:
            raise RecipeError(
                f"dimension {axis} is {theirs} in the model, and {ours!r} in the recipe",
                where=where,
                fix=f"write {theirs}; only a dynamic dimension of the model can be chosen",
            )
    return wanted


def _read_data(
    recipe: Recipe, accuracy: AccuracySection, facts: ModelFacts, inputs: Shapes
) -> tuple[Samples, Samples | None]:
    from modelforge.samples import load_samples

    tensors = [TensorFacts(tensor.name, tensor.dtype, inputs[tensor.name]) for tensor in facts.inputs]
    dims = {symbol: (dim.smallest, dim.largest) for symbol, dim in recipe.dims.items()}
    load = partial(load_samples, folder=recipe.folder, inputs=tensors, dims=dims)
    samples = load(accuracy.data, limit=accuracy.samples, where=recipe.where("accuracy", "data"))
    if accuracy.metric in ("top1", "topk") and samples.labels is None:
        raise DataError(
            f'the metric {accuracy.metric} needs labels, and the data has no array "label"',
            where=f"{recipe.where('accuracy', 'data')} = {accuracy.data}",
            fix='add "label", or choose metric = "cosine"',
        )
    if recipe.calibration is None:
        return samples, None
    where = recipe.where("calibration", "data")
    return samples, load(recipe.calibration.data, limit=recipe.calibration.samples, where=where)


def _check_calibration(recipe: Recipe, calibration: Samples | None) -> list[str]:
    """Refuse data that says little about real inputs, where a ladder will use it; gives what was allowed instead."""
    wanted = any(rung in ("int8", "mixed") for section in recipe.targets for rung in section.precision)
    if calibration is None or recipe.calibration is None or not wanted:
        return []
    from modelforge.quantize.calib_checks import check_calibration

    section = recipe.calibration
    where = recipe.where("calibration", "data")
    return [each.what for each in check_calibration(calibration, floor=section.floor, allow=section.allow, where=where)]


def _calibration_facts(recipe: Recipe, calibration: Samples, allowed: list[str]) -> dict[str, Any]:
    assert recipe.calibration is not None, "there is data"
    facts = {"samples": calibration.count, "digest": calibration.digest, "method": recipe.calibration.method}
    return {**facts, "allowed": allowed} if allowed else facts


def _model_source(model: Path) -> Source:
    from modelforge.graph.load import model_files

    paths = {path.relative_to(model.parent).as_posix(): path for path in model_files(model)}
    digests = {name: digest_file(path).digest for name, path in paths.items()}
    return Source("model", digests, partial(_link_files, paths))


def _samples_source(title: str, samples: Samples) -> Source:
    from modelforge.samples import write_samples

    # The digest is of the arrays, not of the file that they are written to: it names content, and no blob.
    digests = {"samples.npz": f"arrays-{samples.digest}"}
    return Source(title, digests, lambda folder: write_samples(samples, folder / "samples.npz"))


def _metric_source(recipe: Recipe, metric: str) -> Source | None:
    """The file of the user's own metric; None for a metric of ours or one that an installed package carries."""
    if ":" not in metric:
        return None
    from modelforge.samples import load_function

    load_function(metric, recipe.folder, recipe.where("accuracy", "metric"))
    name = metric.partition(":")[0].replace(".", "/") + ".py"
    path = recipe.folder / name
    if not path.is_file():
        return None
    return Source("metric", {name: digest_file(path).digest}, partial(_link_files, {name: path}))


def file_source(title: str, path: Path) -> Source:
    """One file of the user's own."""
    return Source(title, {path.name: digest_file(path).digest}, partial(_link_files, {path.name: path}))


def _link_files(paths: Mapping[str, Path], folder: Path) -> None:
    for name, path in paths.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path.resolve())
