"""Run the stages of a split one after the other in ONNX Runtime, and hold the chain against the whole model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from modelforge.errors import ModelError
from modelforge.graph.compare import Sample, distance, open_session, reference_samples, run

Array = NDArray[Any]


@dataclass(frozen=True)
class ChainCheck:
    """How far the chain is from the whole, both in ONNX Runtime on this CPU with graph optimisation off.

    Attributes:
        max_abs: the largest absolute difference of any output; 0 says that all bits agree.
        output: where it is.
        samples: how many feeds were run.
        data: ``random``: seeded random inputs of the declared shapes; ``given``: the user's.
        reason: what is wrong, empty where the chain equals the whole within FP32 rounding.
    """

    max_abs: float
    output: str
    samples: int
    data: str
    sizes: tuple[Mapping[str, int], ...]
    reason: str = ""

    @property
    def identical(self) -> bool:
        return not self.reason and self.max_abs == 0


class Chain:
    """Sessions of a split's stages, in order; feeds go in and outputs come out as of the whole model."""

    def __init__(self, folder: Path, *, optimize: bool = False) -> None:
        self.manifest = read_manifest(folder)
        self._sessions = [
            (open_session(folder / stage["file"], optimize=optimize), stage) for stage in self.manifest["stages"]
        ]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs of the model. Feeds that no stage reads are passed over."""
        values: dict[str, Array] = dict(inputs)
        for session, stage in self._sessions:
            feed = {tensor["name"]: values[tensor["name"]] for tensor in stage["inputs"]}
            values |= run(session, feed)
        return {output["name"]: values[output["name"]] for output in self.manifest["outputs"]}


def compare_chain(
    model: Path,
    folder: Path,
    *,
    feeds: Sequence[Mapping[str, Array]] = (),
    sizes: Mapping[str, int] | None = None,
    shapes: Mapping[str, tuple[int | str, ...]] | None = None,
) -> ChainCheck:
    """Run the model and the chain on the same inputs, graph optimisation off, and compare all outputs.

    Args:
        folder: what :func:`modelforge.graph.split_write.write_split` wrote.
        feeds: arrays by input name; without any, seeded random inputs of the declared shapes.
        sizes: of open dimensions for the random inputs.

    Raises:
        ModelError: the whole model does not run.
    """
    model = Path(model)
    if feeds:
        samples = [Sample(feed, {}, {}) for feed in feeds]
    else:
        samples = reference_samples(model, shapes or {}, sizes or {}, str(model))
    bound = tuple(sample.sizes for sample in samples)
    kind = "given" if feeds else "random"
    # One after the other: both at once would hold the weights twice.
    session = open_session(model, optimize=False)
    references = [run(session, sample.inputs) for sample in samples]
    del session
    largest, worst, reason = 0.0, "", ""
    try:
        chain = Chain(Path(folder))
        for sample, reference in zip(samples, references, strict=True):
            outputs = chain.run(sample.inputs)
            for name, exact in reference.items():
                difference = distance(exact, outputs[name], _RELATIVE)
                if difference.max_abs > largest or difference.reason:
                    largest, worst = max(largest, difference.max_abs), name
                if difference.reason and not reason:
                    reason = f"output {name!r} {difference.reason}"
    except Exception as error:  # ONNX Runtime raises classes of its C++ module that share no base
        text = " ".join(str(error).split())[:300]
        return ChainCheck(float("inf"), "", len(samples), kind, bound, f"the chain does not run: {text}")
    return ChainCheck(largest, worst, len(samples), kind, bound, reason)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The stage manifest of a split.

    Raises:
        ModelError: the folder holds none.
    """
    path = Path(folder) / "split.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert manifest["schema"] == 1
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise ModelError(
            "there is no split here", where=str(path), fix="`modelforge split MODEL -o DIR` writes one"
        ) from error
    found: dict[str, Any] = manifest
    return found


_RELATIVE = 1e-5
"""Beyond this share of an output's largest value it is no rounding of FP32."""
