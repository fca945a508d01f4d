"""The recipe: what to build from which model, for which targets, and how good it must be.

Reads TOML and checks all that can be checked without opening the model or the data. Knows no compiler.
"""

from __future__ import annotations

import importlib.util
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, StrictBool, field_validator, model_validator
from pydantic import ValidationError as _Fault

from modelforge.errors import RecipeError, nearest
from modelforge.options import (
    AtcSection,
    EthosUSection,
    Options,
    PreprocessSection,
    QualcommSection,
    RockchipSection,
    Section,
    TensorRtSection,
    TuneSection,
)
from modelforge.schema import dotted_key, explain, line_suffix
from modelforge.target import TAG_PATTERN, PositiveFloat, PositiveInt, Precision, SchemaVersion

METRICS = ("top1", "topk", "cosine", "sqnr")
"""Metrics that the recipe may name without a module."""

Number = Annotated[float, Strict()]


class _Strict(BaseModel):
    # No infinity and no NaN: a gate of `max_drop = inf` passes everything.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Dim(_Strict):
    """The sizes of a symbolic dimension: a range with the size to optimise for, or the sizes that must run fast."""

    min: PositiveInt | None = None
    opt: PositiveInt | None = None
    max: PositiveInt | None = None
    values: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.values is not None:
            if (self.min, self.opt, self.max) != (None, None, None):
                raise ValueError("give either `values` or `min`, `opt`, `max`, not both")
            if list(self.values) != sorted(set(self.values)):
                raise ValueError("`values` must rise, each size once")
            return self
        if self.min is None or self.opt is None or self.max is None:
            raise ValueError("give `min`, `opt` and `max`, or `values`")
        if not self.min <= self.opt <= self.max:
            raise ValueError("`min` <= `opt` <= `max` must hold")
        return self

    @property
    def smallest(self) -> int:
        return self.values[0] if self.values else (self.min or 1)

    @property
    def usual(self) -> int:
        """The size to optimise for; of `values`, the largest."""
        return self.values[-1] if self.values else (self.opt or 1)

    @property
    def largest(self) -> int:
        return self.values[-1] if self.values else (self.max or 1)

    @property
    def gears(self) -> tuple[int, ...]:
        """The sizes worth code of their own, rising."""
        return self.values or tuple(sorted({self.smallest, self.usual, self.largest}))

    def facts(self) -> dict[str, Any]:
        if self.values:
            return {"values": list(self.values)}
        return {"min": self.min, "opt": self.opt, "max": self.max}


class ModelSection(_Strict):
    path: str


class InputSection(_Strict):
    shape: Annotated[
        tuple[PositiveInt | Annotated[str, Field(min_length=1)], ...],
        Field(description="sizes are whole numbers above 0, or names of symbols bounded under [dims]"),
    ]
    preprocess: PreprocessSection | None = None


class CalibrationSection(_Strict):
    """``floor`` is how many different samples there must be; ``allow`` lets pass, on record, what else is refused."""

    data: str
    samples: PositiveInt | None = None
    floor: PositiveInt = 16
    allow: tuple[Literal["few", "random", "constant"], ...] = ()
    method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"


class AccuracySection(_Strict):
    """``min_agreement`` and ``min_sqnr_db`` stand beside the metric; without them a default per precision holds.

    ``emulated``: so many samples go through an emulator or simulator however slow it is, where the metric judges.
    """

    data: str
    metric: str
    max_drop: Annotated[float, Strict(), Field(ge=0)] | None = None
    k: PositiveInt = 5
    output: str | None = None
    samples: PositiveInt | None = None
    emulated: PositiveInt | None = None
    min_reference: Number | None = None
    min_agreement: Annotated[float, Strict(), Field(ge=0, le=1)] | None = None
    min_sqnr_db: Number | None = None

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        if metric not in METRICS and ":" not in metric:
            raise ValueError(f'unknown metric; {nearest(metric, METRICS)} (or give your own as "module:function")')
        return metric

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.metric == "sqnr" and self.max_drop is not None:
            raise ValueError("metric `sqnr` has no drop: give `min_sqnr_db` instead of `max_drop`")
        if self.metric != "sqnr" and self.max_drop is None:
            raise ValueError(f"metric `{self.metric}` needs `max_drop`, the absolute drop that is allowed")
        return self


class ServingSection(_Strict):
    task: str | None = None
    latency_budget_ms: PositiveFloat | None = None
    fallback: tuple[str, ...] = ()


class LinkSection(_Strict):
    """A link between neighbours of ``split.tiers``: what a transfer costs beside its bytes, and bytes a second."""

    latency_ms: Annotated[float, Strict(), Field(ge=0)]
    bandwidth: PositiveFloat


class SplitSection(_Strict):
    """How the model is cut into stages; one of ``at``, ``stages``, ``max_stage_bytes`` and ``tiers`` says where.

    Attributes:
        at: tensors at which stages end; a cut of several tensors is an array.
        stages: how many, balanced by ``balance``.
        max_stage_bytes: limit for the weights and activations of a stage.
        tiers: target tags from the device to the cloud; the cut with the least estimated time over ``links``.
        names: of the stages, in order; default stage-1, stage-2 ...
        transport: how float tensors cross from one stage to the next.
    """

    at: tuple[str | tuple[str, ...], ...] = ()
    stages: Annotated[int, Strict(), Field(ge=2)] | None = None
    balance: Literal["flops", "bytes", "time"] = "flops"
    max_stage_bytes: PositiveInt | None = None
    tiers: tuple[str, ...] = ()
    links: tuple[LinkSection, ...] = ()
    names: tuple[Annotated[str, Field(pattern=r"^[a-z0-9]+(?:-[a-z0-9]+)*$")], ...] = ()
    transport: Literal["fp32", "fp16", "int8"] = "fp32"

    @model_validator(mode="after")
    def _check(self) -> Self:
        ways = [self.at, self.stages, self.max_stage_bytes, self.tiers]
        if sum(bool(way) for way in ways) != 1:
            raise ValueError("give one of `at`, `stages`, `max_stage_bytes` and `tiers`")
        if self.tiers and len(self.links) != len(self.tiers) - 1:
            raise ValueError(f"{len(self.tiers)} tiers need {len(self.tiers) - 1} links between them")
        if self.links and not self.tiers:
            raise ValueError("`links` join `tiers`, and there are none")
        if len(set(self.names)) < len(self.names) or "main" in self.names:
            raise ValueError("the names of stages must differ, and none may be `main`")
        return self


class TargetSection(_Strict):
    tag: Annotated[str, Field(pattern=TAG_PATTERN, description="a tag has lower-case letters, digits and hyphens only")]
    precision: Annotated[tuple[Precision, ...], Field(min_length=1)]
    required: StrictBool = True
    compiler: str | None = None
    prefer: Literal["ladder", "speed"] = "ladder"
    stages: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    partition: Literal["npu"] | None = None
    tensorrt: TensorRtSection | None = None
    atc: AtcSection | None = None
    rockchip: RockchipSection | None = None
    qualcomm: QualcommSection | None = None
    ethos_u: Annotated[EthosUSection | None, Field(alias="ethos-u")] = None
    tune: TuneSection | None = None
    options: dict[str, Any] = {}

    @property
    def sections(self) -> dict[str, Options]:
        """What the recipe says to single compilers, by ``Compiler.section``; ``options`` is for those of others."""
        given: dict[str, Options] = {name: section.given() for name, section in self._own.items()}
        return given | ({"options": self.options} if self.options else {})

    def files(self, section: str | None) -> dict[str, str]:
        """The user's own files that a section names, by option: :meth:`modelforge.options.Section.files`."""
        own = self._own.get(section or "")
        return {} if own is None else own.files()

    def aids(self, section: str | None) -> dict[str, str]:
        """Files that a section names to help a compile along, by option: :meth:`modelforge.options.Section.aids`."""
        own = self._own.get(section or "")
        return {} if own is None else own.aids()

    def quantizes(self, section: str | None) -> bool:
        """Whether a section leaves INT8 to the compiler: :meth:`modelforge.options.Section.quantizes`."""
        own = self._own.get(section or "")
        return own is not None and own.quantizes()

    def for_compiler(self, compiler: str, precision: Precision) -> TargetSection:
        """The same target by another compiler, at one precision, without what is said to single compilers."""
        silent = {name.replace("-", "_"): None for name in self._own}
        return self.model_copy(update={**silent, "options": {}, "compiler": compiler, "precision": (precision,)})

    def databases(self, section: str | None) -> dict[str, str]:
        """Databases that a section names, by option: :meth:`modelforge.options.Section.databases`."""
        own = self._own.get(section or "")
        return {} if own is None else own.databases()

    @property
    def _own(self) -> dict[str, Section]:
        own: dict[str, Section | None] = {
            "tensorrt": self.tensorrt,
            "atc": self.atc,
            "rockchip": self.rockchip,
            "qualcomm": self.qualcomm,
            "ethos-u": self.ethos_u,
            "tune": self.tune,
        }
        return {name: section for name, section in own.items() if section is not None}

    @field_validator("precision")
    @classmethod
    def _once(cls, precision: tuple[Precision, ...]) -> tuple[Precision, ...]:
        if len(set(precision)) < len(precision):
            raise ValueError("a precision stands twice in the ladder")
        return precision


class _RecipeFile(_Strict):
    schema_: SchemaVersion
    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9]+(?:[._-][a-z0-9]+)*$",
            description="a name has lower-case letters and digits, with single dots, hyphens or underscores between",
        ),
    ]
    version: Annotated[
        str,
        Field(
            pattern=r"^[0-9]+\.[0-9]+\.[0-9]+(?:-[0-9A-Za-z.-]+)?$", description="three numbers: 1.2.0, or 1.2.0-rc.1"
        ),
    ]
    model: ModelSection
    inputs: dict[str, InputSection] = {}
    dims: dict[str, Dim] = {}
    calibration: CalibrationSection | None = None
    accuracy: AccuracySection | None = None
    serving: ServingSection = ServingSection()
    split: SplitSection | None = None
    target: Annotated[tuple[TargetSection, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Recipe:
    """One recipe, its paths resolved against its own folder."""

    path: Path
    name: str
    version: str
    model: Path
    inputs: dict[str, tuple[int | str, ...]]
    preprocess: dict[str, PreprocessSection]
    dims: dict[str, Dim]
    calibration: CalibrationSection | None
    accuracy: AccuracySection | None
    serving: ServingSection
    split: SplitSection | None
    targets: tuple[TargetSection, ...]

    @property
    def folder(self) -> Path:
        return self.path.parent

    def where(self, *keys: str | int) -> str:
        """``recipe.toml:12: accuracy.data``, for error messages."""
        return f"{self.path}{line_suffix(self.path, list(keys))}: {dotted_key(list(keys))}"


def find_recipe(path: Path) -> Path:
    """The TOML file that the user means: the file itself, or ``recipe.toml`` in the folder."""
    if path.is_dir():
        if not (path / "recipe.toml").is_file():
            raise RecipeError(
                "this folder holds no recipe.toml", where=str(path), fix="`modelforge init MODEL.onnx` writes one"
            )
        return path / "recipe.toml"
    if not path.exists():
        raise RecipeError("there is no such recipe", where=str(path), fix="give a folder with recipe.toml, or a file")
    return path


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: with the file, the line and the key.
    """
    path = find_recipe(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError("is not a text file in UTF-8", where=str(path), fix="a recipe is a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"is not valid TOML: {error}", where=str(path)) from error
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path)) from error
    try:
        file = _RecipeFile.model_validate(data)
    except _Fault as error:
        what, where, fix = explain(error, _RecipeFile, path, data)
        raise RecipeError(what, where=where, fix=fix) from None
    recipe = Recipe(
        path=path,
        name=file.name,
        version=file.version,
        model=_model_path(file.model.path, path),
        inputs={name: section.shape for name, section in file.inputs.items()},
        preprocess={name: each.preprocess for name, each in file.inputs.items() if each.preprocess is not None},
        dims=dict(file.dims),
        calibration=file.calibration,
        accuracy=file.accuracy,
        serving=file.serving,
        split=file.split,
        targets=file.target,
    )
    _check_symbols(recipe)
    _check_tags(recipe)
    return recipe


def _check_tags(recipe: Recipe) -> None:
    seen: set[str] = set()
    for index, section in enumerate(recipe.targets):
        if section.tag in seen:
            raise RecipeError(
                f'target "{section.tag}" stands twice',
                where=recipe.where("target", index, "tag"),
                fix="give each target once, with its ladder",
            )
        seen.add(section.tag)
        if section.partition is not None and recipe.split is not None:
            raise RecipeError(
                "a model that is split by [split] is not shared out between an NPU and its CPU as well",
                where=recipe.where("target", index, "partition"),
                fix="take one of the two out",
            )
        if section.stages is not None and recipe.split is None:
            raise RecipeError(
                "the model is not split, so that there are no stages to choose",
                where=recipe.where("target", index, "stages"),
                fix="add [split], or take `stages` out",
            )


def _check_symbols(recipe: Recipe) -> None:
    used = {size for shape in recipe.inputs.values() for size in shape if isinstance(size, str)}
    for name, shape in recipe.inputs.items():
        for size in shape:
            if isinstance(size, str) and size not in recipe.dims:
                raise RecipeError(
                    f'the symbol "{size}" has no bounds under [dims]',
                    where=recipe.where("inputs", name, "shape"),
                    fix=f"add to [dims]: {size} = {{ min = 1, opt = 4, max = 8 }}",
                )
    for symbol in recipe.dims:
        if symbol not in used:
            raise RecipeError(
                f'no input uses the symbol "{symbol}"' + (f"; {nearest(symbol, used)}" if used else ""),
                where=recipe.where("dims", symbol),
            )


def _model_path(text: str, recipe: Path) -> Path:
    """A path relative to the recipe, or ``package:NAME/PATH`` for a model that an installed Python package carries."""
    if not text.startswith("package:"):
        return recipe.parent / text
    package, _, inside = text.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(
            f'the model is carried by the Python package "{package}", which is not installed',
            where=f"{recipe}{line_suffix(recipe, ['model', 'path'])}: model.path",
            fix=f"pip install --no-deps {package.replace('_', '-')}",
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside
