"""What a recipe may say to one compiler: the sub-tables of a ``[[target]]``. Knows no compiler.

``[target.tensorrt]``, ``[target.atc]`` ... reach the compiler as ``CompileJob.options``, defaults left out. Which of
them a target's hardware and toolchain allow, the compiler says at plan time (``Compiler.supports``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, StrictBool, model_validator

from modelforge.target import PositiveInt


class Section(BaseModel):
    """A sub-table: closed, so that a misspelt option is told."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def given(self) -> dict[str, Any]:
        """What the recipe says, as JSON."""
        return self.model_dump(mode="json", exclude_none=True, exclude_defaults=True)

    def files(self) -> dict[str, str]:
        """Files of the user's own that it names, relative to the recipe, by option. The compiler gets their paths."""
        return {}

    def aids(self) -> dict[str, str]:
        """As :meth:`files`, but of files that only help a compile along: the model is still the recipe's."""
        return {}

    def quantizes(self) -> bool:
        """Whether the compiler makes INT8 itself: it gets the FP32 model and the calibration samples."""
        return False

    def databases(self) -> dict[str, str]:
        """Databases of earlier tunings that it names, relative to the recipe, by option: tuning gets their paths."""
        return {}


class TensorRtSection(Section):
    """``[target.tensorrt]``: for TensorRT and TensorRT-RTX alike; docs/guides/tensorrt.md says what allows which.

    Attributes:
        workspace_bytes: the builder's limit for scratch memory.
        compute_capabilities: one engine for several GPUs, ``["7.5", "8.0"]``; the target's own is among them.
        version_compatible: the engine loads in newer TensorRT versions too; it is slower.
        hardware_compatibility: the engine loads on GPUs of other kinds too; it is slower.
        strip_plan: the engine holds no weights; they are put in from the lowered model as it is loaded.
        dla_core: build for this DLA core; layers that it cannot have run on the GPU, and are reported.
        builder_optimization_level: how hard the builder searches, 0 to 5; its default is 3.
        timing_cache: what an earlier build for this GPU measured, relative to the recipe; `finalize` leaves one in its
            bundle, and a deferred variant takes it along.
    """

    workspace_bytes: PositiveInt | None = None
    compute_capabilities: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    version_compatible: StrictBool = False
    hardware_compatibility: Literal["ampere+", "same-compute-capability"] | None = None
    strip_plan: StrictBool = False
    dla_core: Annotated[int, Strict(), Field(ge=0)] | None = None
    builder_optimization_level: Annotated[int, Strict(), Field(ge=0, le=5)] | None = None
    timing_cache: Annotated[str, Field(min_length=1)] | None = None

    def aids(self) -> dict[str, str]:
        return {"timing_cache": self.timing_cache} if self.timing_cache else {}


class AtcSection(Section):
    """``[target.atc]``: Huawei's ATC.

    Attributes:
        command: an existing ``atc …`` line, whose options are taken over where they do not contradict the recipe.
        precision_mode: instead of the one that fits the lowered model; recorded, as accuracy was judged without it.
        keep_dtype: names of nodes, or ``OpType::Type``, that keep the precision they have in the model.
        op_precision: kind of implementation by operator type: ``{ Softmax = "high_precision" }``.
        external_weight: weights in files of their own beside the .om.
        host: of the device's CPU, for models whose .om carries host code.
        parallel_compilers, compile_cores: processes and cores that compile operators; fewer take less memory.
        memory_bytes: how much one run of ATC may take.
    """

    command: str | None = None
    precision_mode: (
        Literal[
            "force_fp16", "force_fp32", "cube_fp16in_fp32out", "allow_fp32_to_fp16", "must_keep_origin_dtype",
            "allow_mix_precision", "allow_mix_precision_fp16", "allow_mix_precision_bf16", "allow_fp32_to_bf16",
        ]
        | None
    ) = None  # fmt: skip
    keep_dtype: tuple[str, ...] = ()
    op_precision: dict[str, Literal["high_precision", "high_performance", "enable_hi_float_32_execution"]] = {}
    external_weight: StrictBool = False
    host: Literal["linux-x86_64", "linux-aarch64"] | None = None
    parallel_compilers: Annotated[int, Strict(), Field(ge=1, le=32)] | None = None
    compile_cores: PositiveInt | None = None
    memory_bytes: PositiveInt | None = None


class RockchipSection(Section):
    """``[target.rockchip]``: RKNN-Toolkit2.

    Attributes:
        single_core: build for one NPU core (rk3588): a smaller file, for programs that run several models at once.
        quantizer: who makes INT8: ModelForge, as for all other targets, or the toolkit's own from the calibration data.
    """

    single_core: StrictBool = False
    quantizer: Literal["modelforge", "native"] = "modelforge"

    def quantizes(self) -> bool:
        return self.quantizer == "native"


class QualcommSection(Section):
    """``[target.qualcomm]``: QNN.

    Attributes:
        embed: the context lies inside its .onnx wrapper, one file instead of two.
        optimization: how hard QNN optimizes the graph, 1 to 3; its default is its own (0).
    """

    embed: StrictBool = False
    optimization: Annotated[int, Strict(), Field(ge=1, le=3)] | None = None


class EthosUSection(Section):
    """``[target.ethos-u]``: Arm's Vela.

    Attributes:
        model: the int8 .tflite form of the recipe's model, relative to the recipe: Vela reads no ONNX.
        optimise: for speed, or for the least memory.
    """

    model: Annotated[str, Field(min_length=1)]
    optimise: Literal["performance", "size"] = "performance"

    def files(self) -> dict[str, str]:
        return {"model": self.model}


class TuneSection(Section):
    """``[target.tune]``: measure kernels on the target and take the fastest (TVM); docs/guides/tuning.md.

    Attributes:
        trials: how many candidates to build and measure, over all kernels.
        device: a name of ``modelforge devices``; without one, this machine is measured.
        database: an earlier tuning's ``tuning.json``, relative to the recipe; what it decides is not measured again.
        required: without it, a tuning that fails leaves the variant untuned, and the record says why.
    """

    trials: Annotated[int, Strict(), Field(ge=0, le=100_000)] = 0
    device: Annotated[str, Field(min_length=1)] | None = None
    database: Annotated[str, Field(min_length=1)] | None = None
    required: StrictBool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.trials and self.database is None:
            raise ValueError("give `trials`, `database`, or both")
        if self.device is not None and not self.trials:
            raise ValueError("`device` is where `trials` are measured, and there are none")
        return self

    def databases(self) -> dict[str, str]:
        return {} if self.database is None else {"database": self.database}


class PreprocessSection(Section):
    """``[inputs.NAME.preprocess]``: what the device does to a raw image before the model sees it.

    ``(pixel - mean) / std`` per channel, in the model's own channel order, pixels from 0 to 255. Compilers whose
    hardware does it (Ascend's AIPP) build it in; for the others it is recorded in the bundle.

    Attributes:
        source: how the raw image lies in memory.
        colour: the channel order that the model was trained with.
        size: height and width of the raw image, where it is cropped.
        crop: top, left, height and width that are cut out of it.
    """

    mean: Annotated[tuple[Annotated[float, Strict()], ...], Field(min_length=1, max_length=4)] = (0.0, 0.0, 0.0)
    std: Annotated[tuple[Annotated[float, Strict(), Field(gt=0)], ...], Field(min_length=1, max_length=4)] = (
        1.0,
        1.0,
        1.0,
    )
    source: Literal["rgb888", "bgr888", "yuv420sp", "gray8"] = "rgb888"
    colour: Literal["rgb", "bgr", "gray"] = "rgb"
    swap_uv: StrictBool = False
    size: tuple[PositiveInt, PositiveInt] | None = None
    crop: Annotated[tuple[Annotated[int, Strict(), Field(ge=0)], ...], Field(min_length=4, max_length=4)] | None = None


Options = Mapping[str, Any]
NO_OPTIONS: Options = {}
