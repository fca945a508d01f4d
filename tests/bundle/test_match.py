"""Each way in which a variant cannot run on a device, said before it is tried; and what is not known, said as that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.bundle.device import DeviceFacts
from modelforge.bundle.match import NEEDS, Match, Profile, check, match, needed, profile_of, refuse_if_none_runs
from modelforge.bundle.record import VariantRecord
from modelforge.errors import UnsupportedError
from modelforge.store import canonical_json
from tests.bundle.deployed import ABOUT, COMPILERS, PI_5, T4_SERVER, device, opened, record

EVERYTHING = {
    "isa": "aarch64",
    "cpuinfo": PI_5["cpuinfo"],
    "gpus": [{"name": "Orin", "sm": 87}, {"name": "T4", "sm": 75}, {"name": "A100", "sm": 80}],
    "ascend": ["Ascend310P3"],
    "rockchip": ["rk3588"],
    "qualcomm": [{"soc": "sm8550", "htp_arch": 73, "soc_model": 43}],
    "versions": {"tensorrt_rtx": "1.7.1.116", "tensorrt": "10.3.0.30", "cann": "8.0.RC2", "rknn": "2.3.2",
                 "qnn": "2.51.0", "glibc": "2.36"},
}  # fmt: skip


def made(tag: str, **more: Any) -> VariantRecord:
    data = record(tag, **more)
    if data["artifact"]:
        data["artifact"] = {"file": "main.x", "digest": "sha256:" + "0" * 64, "size": 1}
    return VariantRecord.from_bytes(canonical_json(data), where=tag)


def held(tag: str, facts: DeviceFacts, **more: Any) -> Match:
    return match(made(tag, **more), facts, profile_of({}, tag))


@pytest.mark.parametrize("tag", sorted(set(COMPILERS) - {"x86-64", "x86-64-avx512"}))
def test_everything_is_here(tag: str) -> None:
    found = held(tag, device(EVERYTHING))
    assert found == Match(met=found.met)
    assert found.verdict == "runs"
    assert found.met


# What is changed on the device that has everything, and what is said then.
WRONG = [
    ("t4", {"gpus": []}, "needs an NVIDIA GPU of compute capability 7.5; there is none here"),
    ("t4", {"gpus": [{"name": "A100", "sm": 80}]}, "needs an NVIDIA GPU of compute capability 7.5; here: A100 (8.0)"),
    ("t4", {"versions": {"tensorrt_rtx": "1.6.0.50"}}, "needs TensorRT-RTX ==1.7.1.116; 1.6.0.50 is here"),
    ("t4", {"versions": {"tensorrt_rtx": None}}, "needs TensorRT-RTX ==1.7.1.116; it is not installed here"),
    ("jetson-agx-orin", {"versions": {"tensorrt": "10.7.0.23"}}, "needs TensorRT ==10.3.0.30; 10.7.0.23 is here"),
    ("ascend-310p3", {"ascend": ["Ascend310B4"]}, "needs an Ascend310P3 processor; here: Ascend310B4"),
    ("ascend-310p3", {"ascend": []}, "needs an Ascend310P3 processor; there is none here"),
    ("ascend-310p3", {"versions": {"cann": "7.0.0"}}, "needs CANN >=8.0.RC1; 7.0.0 is here"),
    ("rk3588", {"rockchip": ["rk3566"]}, "needs a Rockchip NPU of rk3588; here: rk3566"),
    ("rk3588", {"versions": {"rknn": "1.3.0"}}, "needs the RKNN runtime (librknnrt) >=2.3.0; 1.3.0 is here"),
    ("qualcomm-htp-v73", {"qualcomm": [{"htp_arch": 75, "soc_model": 57}]}, "needs a Qualcomm Hexagon v73; here: 75"),
    ("cortex-a76", {"isa": "x86-64"}, "needs a CPU of aarch64; this CPU is x86-64"),
    ("cortex-a76", {"cpuinfo": ["asimd"]}, "this CPU lacks asimddp, fphp, asimdhp, atomics, crc32"),
    ("cortex-a76", {"versions": {"glibc": "2.17"}}, "needs glibc >=2.28; 2.17 is here"),
]


@pytest.mark.parametrize(("tag", "change", "said"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_run_is_told_why(tag: str, change: dict[str, Any], said: str) -> None:
    found = held(tag, device(EVERYTHING, **change))
    assert found.verdict == "cannot"
    assert said in " / ".join(found.cannot)


UNKNOWN = [
    ("t4", ["gpus"], "which NVIDIA GPU is here is not known"),
    ("ascend-310p3", ["ascend"], "which Ascend processor is here is not known"),
    ("rk3588", ["rockchip"], "which Rockchip NPU is here is not known"),
    ("qualcomm-htp-v73", ["qualcomm"], "which Qualcomm chip is here is not known"),
    ("cortex-a76", ["isa"], "the CPU's instruction set is not known"),
    ("cortex-a76", ["cpuinfo"], "the CPU's flags are not known"),
    ("t4", ["versions"], "none was found here, and it may be installed elsewhere"),
]


@pytest.mark.parametrize(("tag", "gone", "said"), UNKNOWN, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_known_is_neither_pass_nor_failure(tag: str, gone: list[str], said: str) -> None:
    facts = {key: value for key, value in EVERYTHING.items() if key not in gone}
    found = held(tag, device(facts))
    assert found.verdict == "unknown"
    assert not found.cannot
    assert said in " / ".join(found.unknown)


def test_flags_of_another_instruction_set_are_not_told() -> None:
    found = held("cortex-a76", device(T4_SERVER))
    assert found.cannot == ("needs a CPU of aarch64; this CPU is x86-64",)


def test_a_version_that_says_too_little() -> None:
    found = held("jetson-agx-orin", device(EVERYTHING, versions={"tensorrt": "10.3.0"}))
    assert found.unknown == ("needs TensorRT ==10.3.0.30; 10.3.0 is here, which does not say enough",)


def test_one_of_several_installed_versions_is_enough() -> None:
    assert held("t4", device(EVERYTHING, versions={"tensorrt_rtx": ["1.6.0", "1.7.1.116"]})).verdict == "runs"


@pytest.mark.parametrize(
    ("wanted", "verdict"), [(87, "runs"), ([86, 75], "runs"), (">=86", "runs"), (90, "cannot"), (">=90", "cannot")]
)
def test_forms_of_a_compute_capability(wanted: Any, verdict: str) -> None:
    """A number, one of a list, or a condition (AMPERE_PLUS engines); it stands for the profile's own."""
    needs = {"tensorrt": "==10.3.0.30", "sm": wanted}
    assert held("jetson-agx-orin", device(EVERYTHING), needs=needs).verdict == verdict


def test_the_records_needs_stand_for_the_profiles() -> None:
    """ONNX Runtime's artifact runs on any x86-64, whatever flags the profile was tuned for."""
    old_pc = device(T4_SERVER, cpuinfo=["sse2"])
    assert held("x86-64", old_pc).verdict == "cannot"
    assert held("x86-64", old_pc, needs={"cpuinfo": [], "onnxruntime": ">=1.23"}).verdict == "runs"


def test_a_record_with_a_sentence_alone() -> None:
    found = held("x86-64", device(T4_SERVER), needs=None)
    assert found.verdict == "unknown"
    assert found.unknown == ("the record says in words alone what runtime it needs: what onnxruntime needs",)


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ({"flux_capacitor": ">=2"}, "does not know what that is"),
        ({"cann": "8.0 or so"}, "cannot read that"),
        ({"soc_model": {}}, "cannot read that"),
        ({"isa": 5}, "cannot read that"),
        ({"sm": {"a": 1}}, "cannot read that"),
    ],
)
def test_needs_that_cannot_be_read_are_not_known(needs: dict[str, Any], said: str) -> None:
    found = held("cortex-a76", device(EVERYTHING), needs=needs)
    assert said in " / ".join(found.unknown)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(NEEDS)) | st.text(), JSON, min_size=1))
def test_needs_from_anywhere_are_answered(needs: dict[str, Any]) -> None:
    found = held("cortex-a76", device(EVERYTHING), needs=needs)
    assert found.verdict in ("runs", "unknown", "cannot")
    needed(made("cortex-a76", needs=needs), profile_of({}, "cortex-a76"))


@pytest.mark.parametrize(("status", "said"), [("deferred", "modelforge finalize"), ("failed", "no rung met its gate")])
def test_what_was_not_compiled_cannot_run(status: str, said: str) -> None:
    found = held("t4", device(EVERYTHING), status=status, notes=["no rung met its gate"])
    assert found.verdict == "cannot"
    assert said in found.cannot[0]


def test_a_bundles_own_profile_comes_first() -> None:
    arch = {"kind": "cuda", "sm": 87}
    about = {"targets": {"t4": {"title": "A board", "tier": "edge", "arch": arch}}}
    assert profile_of(about, "t4") == Profile("t4", "A board", "edge", arch)
    beside = {"title": "The CPU of the board", "tier": "edge", "arch": {"kind": "cpu", "isa": "aarch64"}}
    both = {"targets": {**about["targets"], "t4/stage2-t4-cpu": beside}}
    assert profile_of(both, "t4", stage="stage2-t4-cpu").title == "The CPU of the board"
    assert profile_of(both, "t4", stage="stage1-t4-npu").title == "A board"
    assert profile_of({"targets": {"t4": {"arch": "?"}}}, "t4").arch == {"kind": "cuda", "sm": 75, "dla": False}


def test_a_target_that_nobody_knows() -> None:
    found = match(made("t4"), device(EVERYTHING), profile_of({}, "my-own-board"))
    assert "no profile of the target" in " / ".join(found.unknown)
    assert found.verdict == "unknown"


def test_pull_checks_all_and_refuses_only_where_none_runs(tmp_path: Path) -> None:
    bundle = opened(tmp_path, [record("t4"), record("x86-64"), record("rk3588")], ABOUT)
    found = check(bundle.about, bundle.variants, device(T4_SERVER))
    assert {name: each.verdict for name, each in found.items()} == {"t4": "runs", "x86-64": "runs", "rk3588": "cannot"}
    refuse_if_none_runs(found, "a place")
    with pytest.raises(UnsupportedError) as caught:
        refuse_if_none_runs({"rk3588": found["rk3588"]}, "a place")
    assert "needs a Rockchip NPU of rk3588; there is none here" in str(caught.value)
    assert caught.value.exit_code == 2


def test_one_batch_set_that_runs_is_enough(tmp_path: Path) -> None:
    sizes = [({"values": [1]}, "compiled"), ({"values": [8]}, "deferred")]
    bundle = opened(tmp_path, [record("t4", batch=batch, status=status) for batch, status in sizes], ABOUT)
    assert check(bundle.about, bundle.variants, device(T4_SERVER))["t4"].verdict == "runs"


def test_what_a_device_would_have_to_be() -> None:
    assert needed(made("t4"), profile_of({}, "t4")) == (
        "an NVIDIA GPU of compute capability 7.5",
        "TensorRT-RTX ==1.7.1.116",
    )
