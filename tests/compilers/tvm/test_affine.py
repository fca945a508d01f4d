"""A chain of sums and products with constants is one product and one sum, and gives the same."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

pytest.importorskip("tvm")

from tests.compilers.tvm.kernels.float_layers import agrees, model, values
from tests.compilers.tvm.kernels.machines import AVX2


def test_a_batch_normalisation_behind_a_concatenation_is_two_operators() -> None:
    """As in DenseNet."""
    channels = 24
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Concat", ["p", "p"], ["c"], axis=1),
        helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "variance"], ["n"]),
        helper.make_node("Mul", ["n", "more"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["y"]),
    ]
    made = model(
        nodes,
        (1, channels // 2, 9, 8),
        {
            "scale": values(channels, seed=3),
            "bias": values(channels, seed=4),
            "mean": values(channels, seed=5),
            "variance": np.abs(values(channels, seed=6)) + 1,
            "more": values(1, channels, 1, 1, seed=7),
            "w": values(8, channels, 1, 1),
        },
    )
    names = [report.name for report in agrees(made, AVX2)]
    (joined,) = [name for name in names if "concat" in name]
    assert joined.count("multiply") == joined.count("add") == joined.count("relu") == 1, joined
    assert "transpose" not in joined


@pytest.mark.parametrize(
    "chain",
    [
        [("Sub", "c"), ("Div", "d"), ("Mul", "c"), ("Add", "e")],
        [("Add", "one"), ("Sub", "one")],
        [("Mul", "d"), ("Mul", "e"), ("Add", "c"), ("Add", "c")],
    ],
)
def test_chains(chain: list[tuple[str, str]]) -> None:
    names = ["x", *(f"t{at}" for at in range(len(chain)))]
    nodes = [
        helper.make_node(kind, [names[at], constant], [names[at + 1]]) for at, (kind, constant) in enumerate(chain)
    ]
    nodes.append(helper.make_node("Relu", [names[-1]], ["y"]))
    constants = {
        "c": values(1, 6, 1, 1, seed=3),
        "d": np.abs(values(6, 1, 1, seed=4)) + 1,
        "e": values(1, 6, 1, 1, seed=5),
        "one": np.ones((), np.float32),
    }
    (report,) = agrees(model(nodes, (2, 6, 4, 5), constants), AVX2)
    assert sum(report.name.count(kind) for kind in ("add", "multiply", "subtract", "divide")) <= 2


def test_a_step_that_somebody_else_reads_keeps_its_value() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "c"], ["a"]),
        helper.make_node("Mul", ["a", "c"], ["b"]),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("Sub", ["d", "a"], ["y"]),
    ]
    agrees(model(nodes, (1, 6, 4, 5), {"c": values(1, 6, 1, 1)}), AVX2)


@pytest.mark.parametrize("kind", ["Max", "Min", "Sum", "Mean"])
def test_operators_of_several_tensors_stack_nothing(kind: str) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node(kind, ["x", "r", "c"], ["y"]),
    ]
    reports = agrees(model(nodes, (2, 3, 4, 5), {"c": values(3, 1, 1)}), AVX2)
    assert not [report for report in reports if "stack" in report.name or "concatenate" in report.name]
