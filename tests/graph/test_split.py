"""Real models, split in every way: the chain of stages gives what the whole model gives, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest

from modelforge.errors import InputError, ModelError, UnsupportedError
from modelforge.graph.load import check_model
from modelforge.graph.roofline import Machine, layer_seconds
from modelforge.graph.split import At, Balanced, Bounded, BySupport, OverTiers, Way, plan_split
from modelforge.graph.split_chain import compare_chain
from modelforge.graph.split_graph import LayerGraph, read_layers
from modelforge.graph.split_plan import SplitPlan, plan_from_facts
from modelforge.graph.split_tiers import Link, Tier, TierProblem
from modelforge.graph.split_write import Stages, write_split
from tests.graph.conftest import packaged
from tests.graph.split_models import export_bert, random_dag

SIZES: dict[str, dict[str, int]] = {
    "resnet50": {},
    "nudenet": {"height": 160, "width": 160},
    "rec4": {"x[2]": 48, "p2o.DynamicDimension.1": 64},
    "magika": {},
}
WAYS = ("flops", "bytes", "time", "memory", "support", "tiers")
VISION = frozenset("Conv Relu Add Mul Sigmoid MaxPool Concat Clip GlobalAveragePool BatchNormalization Split".split())
SLOW = Machine({"conv": 60e9, "matmul": 60e9, "other": 20e9}, 10e9, 4, 1e-5)
FAST = Machine({"conv": 5e12, "matmul": 5e12, "other": 2e12}, 500e9, 4, 1e-5)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, 64 wide, both dimensions open."""
    path = tmp_path_factory.mktemp("bert") / "bert.onnx"
    return export_bert(path, layers=3, width=64, heads=4, words=100, length=16, dynamic=True)


def split(model: Path, graph: LayerGraph, way: Way, folder: Path) -> tuple[SplitPlan, Stages]:
    plan = plan_split(graph, way)
    return plan, write_split(model, plan, folder)


def check(model: Path, plan: SplitPlan, stages: Stages, sizes: Mapping[str, int]) -> None:
    """Valid ONNX, stages that fit together, and the same bits at the end."""
    assert plan_from_facts(json.loads(json.dumps(plan.facts()))) == plan
    made = set(plan.inputs)
    for stage, path in zip(plan.stages, stages.files, strict=True):
        check_model(path)
        graph = onnx.load(path, load_external_data=False).graph
        assert [value.name for value in graph.input] == [tensor.name for tensor in stage.inputs]
        assert [value.name for value in graph.output] == [tensor.name for tensor in stage.outputs]
        assert {tensor.name for tensor in stage.inputs} <= made, "a stage reads only what is there before it"
        made |= {tensor.name for tensor in stage.outputs}
    found = compare_chain(model, stages.folder, sizes=sizes)
    assert found.reason == ""
    assert found.max_abs == 0
    assert found.samples >= 1


def ways(graph: LayerGraph) -> dict[str, Way]:
    weights = sum(weight.bytes for weight in graph.weights.values())
    tiers = [Tier("device", layer_seconds(graph, SLOW)), Tier("cloud", layer_seconds(graph, FAST))]
    middle = Tier("edge", [time / 4 for time in tiers[0].seconds])
    links = {("device", "edge"): Link(1e-5, 2e9), ("edge", "cloud"): Link(1e-5, 2e8)}
    return {
        "flops": Balanced(2),
        "bytes": Balanced(3, "bytes"),
        "time": Balanced(4, "time", layer_seconds(graph, SLOW)),
        "memory": Bounded(int(weights * 0.9)),
        "support": BySupport(lambda layer: layer.op in VISION, max_stages=3),
        "tiers": OverTiers(TierProblem(graph, (tiers[0], middle, tiers[1]), links, "int8")),
    }


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("resnet50", way) for way in ("flops", "memory", "tiers")),
        *((name, way) for name in ("nudenet", "rec4", "magika") for way in WAYS),
    ],
)
def test_the_chain_is_the_model(tmp_path: Path, name: str, way: str) -> None:
    model = packaged(name)
    graph = read_layers(model, SIZES[name])
    plan, stages = split(model, graph, ways(graph)[way], tmp_path / "stages")
    check(model, plan, stages, SIZES[name])
    if way in ("flops", "bytes", "time"):
        assert len(plan.stages) == {"flops": 2, "bytes": 3, "time": 4}[way]


@pytest.mark.parametrize("way", ["flops", "bytes", "time", "memory", "tiers"])
def test_a_transformer(tmp_path: Path, bert: Path, way: str) -> None:
    """Its attention mask is read by every layer: no cut is a single tensor."""
    sizes = {"batch": 2, "sequence": 16}
    graph = read_layers(bert, sizes)
    plan, stages = split(bert, graph, ways(graph)[way], tmp_path / "stages")
    check(bert, plan, stages, sizes)


@pytest.mark.slow  # BERT-base: half a gigabyte to export, load twice and write
@pytest.mark.parametrize("way", ["flops", "memory", "time", "tiers"])
def test_bert_base(tmp_path: Path, way: str) -> None:
    model = tmp_path / "base.onnx"
    export_bert(model, layers=12, width=768, heads=12, words=30522, length=128, dynamic=False)
    graph = read_layers(model)
    assert sum(layer.flops or 0 for layer in graph.layers) == pytest.approx(22.4e9, rel=0.02)
    plan, stages = split(model, graph, ways(graph)[way], tmp_path / "stages")
    check(model, plan, stages, {})


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs(tmp_path: Path, seed: int) -> None:
    model = random_dag(tmp_path / "dag.onnx", seed, 14)
    graph = read_layers(model)
    for index, way in enumerate(
        (Balanced(2), Balanced(3, "bytes"), BySupport(lambda layer: layer.op == "Add"), Bounded(1200))
    ):
        plan, stages = split(model, graph, way, tmp_path / f"stages{index}")
        check(model, plan, stages, {})


def test_balance_is_the_best_for_the_order_of_layers() -> None:
    """Within the tolerance no stage is longer than it must be; of those cuts the one with least between is taken."""
    graph = read_layers(packaged("resnet50"))
    total = sum(layer.flops or 0 for layer in graph.layers)
    for stages in (2, 4):
        plan = plan_split(graph, Balanced(stages))
        assert max(stage.flops for stage in plan.stages) <= 1.1 * max(total / stages, 0.25 * total / stages) * 1.05
    exact = plan_split(graph, Balanced(2, tolerance=0.0))
    cheap = plan_split(graph, Balanced(2, tolerance=0.2))
    assert max(stage.flops for stage in exact.stages) <= max(stage.flops for stage in cheap.stages)
    assert sum(tensor.bytes or 0 for tensor in cheap.crossing) <= sum(tensor.bytes or 0 for tensor in exact.crossing)


def test_multi_tensor_cuts_balance_a_detector() -> None:
    """All single-tensor cuts of YOLOv8n lie in the first fifth of its work: its neck takes several tensors."""
    graph = read_layers(packaged("nudenet"), {"height": 320, "width": 320})
    plan = plan_split(graph, Balanced(2))
    first, second = (stage.flops for stage in plan.stages)
    assert 0.45 < first / (first + second) < 0.55
    assert len(plan.crossing) > 1


def test_memory_limit_holds_and_needs_no_more_stages_than_it_must() -> None:
    graph = read_layers(packaged("resnet50"))
    limit = 40_000_000
    plan = plan_split(graph, Bounded(limit))
    assert all(stage.weight_bytes <= limit for stage in plan.stages)
    assert len(plan.stages) == 3, "102 MB of weights in parts of at most 40 MB"
    both = plan_split(graph, Bounded(limit, activations=True))
    assert all(stage.weight_bytes + stage.activation_bytes <= limit for stage in both.stages)
    with pytest.raises(ModelError, match=r"no stage can have less than 9437216 bytes") as caught:
        plan_split(graph, Bounded(1_000_000))
    assert "9437216" in str(caught.value.fix)
    assert plan_split(graph, Bounded(9437216)).stages, "the limit that the message names is possible"


def test_support_makes_the_fewest_alternating_stages() -> None:
    graph = read_layers(packaged("nudenet"), {"height": 320, "width": 320})
    runs = {layer.op for layer in graph.layers} - {"Softmax"}
    plan = plan_split(graph, BySupport(lambda layer: layer.op in runs, names=("npu", "cpu")))
    assert [stage.name for stage in plan.stages] == ["stage1-npu", "stage2-cpu", "stage3-npu"]
    nodes = onnx.load(packaged("nudenet"), load_external_data=False).graph.node
    heavy = {layer.node: layer.op for layer in graph.layers if not layer.light}
    assert all(heavy.get(node) != "Softmax" for stage in (plan.stages[0], plan.stages[2]) for node in stage.nodes)
    assert "Softmax" in {nodes[node].op_type for node in plan.stages[1].nodes}


def test_support_with_few_stages_keeps_the_most_work_on_the_target() -> None:
    graph = read_layers(packaged("resnet50"))
    convolutions = [layer for layer in graph.layers if layer.op == "Conv"]
    assert len(plan_split(graph, BySupport(lambda layer: layer.op == "Conv")).stages) > 50
    plan = plan_split(graph, BySupport(lambda layer: layer.op != "MaxPool", max_stages=2))
    on_target = next(stage for stage in plan.stages if stage.name.endswith("supported"))
    assert on_target.flops > 0.9 * sum(layer.flops or 0 for layer in graph.layers)
    with pytest.raises(UnsupportedError, match="too few"):
        plan_split(
            graph,
            BySupport(lambda layer: layer.op == "Conv", fallback=lambda layer: layer.op != "Conv", max_stages=3),
        )
    with pytest.raises(UnsupportedError, match=rf"no target can run the stage with node {convolutions[0].name}"):
        plan_split(graph, BySupport(lambda layer: layer.op == "Relu", fallback=lambda layer: layer.op != "Conv"))


def test_small_supported_parts_are_left_to_the_fallback() -> None:
    graph = read_layers(packaged("resnet50"))
    total = sum(layer.flops or 0 for layer in graph.layers)
    plan = plan_split(graph, BySupport(lambda layer: layer.op != "MaxPool", least_share=0.05))
    parts = [stage for stage in plan.stages if stage.name.endswith("supported")]
    assert parts
    assert all(stage.flops >= 0.05 * total for stage in parts)


@pytest.mark.parametrize(
    ("way", "error", "says"),
    [
        (Balanced(500), ModelError, "cannot be cut into 500 stages"),
        (Balanced(0), InputError, "0 stages"),
        (Balanced(2, "time"), InputError, "time of each layer"),
        (At((("nosuch",),)), ModelError, 'no tensor "nosuch"'),
    ],
)
def test_impossible_wishes_are_refused(way: Way, error: type[Exception], says: str) -> None:
    graph = read_layers(packaged("resnet50"))
    with pytest.raises(error, match=says) as caught:
        plan_split(graph, way)
    assert getattr(caught.value, "fix", None)
    assert getattr(caught.value, "exit_code", None) == 2
