"""Tiers and links as written on the command line and in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelforge.errors import InputError, RecipeError, TargetError
from modelforge.forge.tiers import setup_from_file, setup_from_options, tier_problem
from modelforge.graph.split_graph import read_layers
from modelforge.graph.split_tiers import Link
from modelforge.target import Registry
from tests.graph.conftest import packaged

FILE = """
schema = 1
transport = "int8"
[[tier]]
name = "cloud"
target = "a100"
precision = "fp16"
[[tier]]
name = "device"
target = "cortex-a76"
[[link]]
from = "device"
to = "cloud"
latency = "10ms"
bandwidth = "1.25MB/s"
"""


def test_both_spellings_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(FILE)
    options = setup_from_options(
        ["cloud=a100:fp16", "device=cortex-a76"], ["device-cloud=10ms,1.25MB/s"], transport="int8"
    )
    assert setup_from_file(path) == options
    assert [tier.name for tier in options.tiers] == ["device", "cloud"], "near to far, however they were given"
    assert options.links == {("device", "cloud"): Link(0.01, 1.25e6)}


@pytest.mark.parametrize(
    ("tiers", "links", "says"),
    [
        (["device"], ["device-cloud=1ms,1MB/s"], "is not TIER=TARGET"),
        (["phone=t4", "cloud=a100"], ["phone-cloud=1ms,1MB/s"], 'no tier "phone"'),
        (["device=t4"], [], "two or three different tiers"),
        (["device=t4", "device=a100"], ["device-cloud=1ms,1MB/s"], "two or three different tiers"),
        (["device=t4", "cloud=a100"], [], "no link leads to"),
        (["device=t4", "cloud=a100"], ["cloud-device=1ms,1MB/s"], "does not lead from a nearer tier"),
        (["device=t4", "cloud=a100"], ["device-cloud=1ms"], "is not TIER=LATENCY"),
        (["device=t4", "cloud=a100"], ["1ms,1MB/s"], "is not TIER-TIER"),
        (["device=t4", "cloud=a100"], ["device-cloud=1ms,0MB/s"], "is not TIER=LATENCY"),
        (["device=t4:fp31", "cloud=a100"], ["device-cloud=1ms,1MB/s"], 'no precision "fp31"'),
        (["device=t4", "edge=l4", "cloud=a100"], ["edge-cloud=1ms,1MB/s"], "no link leads to"),
    ],
)
def test_what_does_not_fit_together(tiers: list[str], links: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        setup_from_options(tiers, links)


def test_a_file_with_a_misspelt_key_names_it(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(FILE.replace("latency", "latencie"))
    with pytest.raises(RecipeError, match='unknown key "latencie"; did you mean "latency"') as caught:
        setup_from_file(path)
    assert "devices.toml:" in str(caught.value.where)
    with pytest.raises(RecipeError, match="cannot be read"):
        setup_from_file(tmp_path / "none.toml")


def test_targets_become_times_and_memory() -> None:
    graph = read_layers(packaged("resnet50"))
    setup = setup_from_options(["device=cortex-a76", "cloud=a100:fp16"], ["device-cloud=10ms,1.25MB/s"])
    problem = tier_problem(graph, setup, Registry())
    device, cloud = problem.tiers
    assert sum(device.seconds) > 20 * sum(cloud.seconds)
    assert (device.float_bytes, cloud.float_bytes) == (4, 2)
    assert device.memory == 8 * 2**30 // 4, "a quarter of a device's memory"
    with pytest.raises(TargetError, match='no target "a10"'):
        tier_problem(graph, setup_from_options(["device=t4", "cloud=a10"], ["device-cloud=1ms,1MB/s"]), Registry())
    unknown = setup_from_options(["device=qualcomm-htp-v73", "cloud=a100"], ["device-cloud=1ms,1MB/s"])
    with pytest.raises(InputError, match="knows no peak rate"):
        tier_problem(graph, unknown, Registry())
