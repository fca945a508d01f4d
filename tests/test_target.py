"""Target profiles: the built-in ones load and say where their numbers are from; a wrong one says what is wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from modelforge.errors import TargetError
from modelforge.target import Registry, builtin_folder, load_target

PROFILES = sorted(builtin_folder().glob("*.toml"))
PROMISED = """
    t4 a100 h100 v100 l4 jetson-agx-orin jetson-orin-nano jetson-thor x86-64 x86-64-avx512 armv8 cortex-a53 cortex-a72
    cortex-a76 neoverse-n1 ascend-310 ascend-310p3 ascend-310b4 ascend-910a ascend-910b3 rk3588 rk3576 rk3566 rv1106
    qualcomm-htp-v68 qualcomm-htp-v69 qualcomm-htp-v73 qualcomm-htp-v75 qualcomm-htp-v79 qualcomm-qcm6490
    qualcomm-qcs9100
    ethos-u55-128 ethos-u65-256 ethos-u85-256
"""
COMPILERS = {"tensorrt", "tensorrt-rtx", "tvm", "onnxruntime", "ascend", "rockchip", "qualcomm", "ethos-u"}
GPU = """
schema = 1
title = "A GPU"
vendor = "nvidia"
tier = "cloud"
compilers = ["tensorrt"]
precisions = ["fp16"]

[arch]
kind = "cuda"
sm = 75

[memory]
bytes = 1
bandwidth = 1.0

[peak]
"""


@pytest.fixture(autouse=True)
def _no_user_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELFORGE_TARGETS", raising=False)


def test_every_promised_target_loads() -> None:
    registry = Registry()
    assert registry.tags() == sorted(PROMISED.split())
    for target in registry:
        assert set(target.compilers) <= COMPILERS, target.tag
        assert ("mixed" in target.precisions) == ("int8" in target.precisions and len(target.precisions) > 1), (
            target.tag
        )


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_number_has_its_source(path: Path) -> None:
    table, numbers = "", 0
    for line in path.read_text(encoding="utf-8").splitlines():
        header = re.match(r"\[(\w+)\]", line)
        table = header.group(1) if header else table
        if table in ("arch", "memory", "peak") and re.match(r"\w+ = [\d.]", line):
            numbers += 1
            assert re.search(r"  # (source|estimate): \S.{8,}", line), line
    assert numbers >= 3


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_peaks_agree_with_the_precisions(path: Path) -> None:
    target = load_target(path)
    peaks = {name: rate for name, rate in target.peak.model_dump().items() if rate is not None}
    assert set(peaks) <= set(target.precisions)
    assert list(peaks.values()) == sorted(peaks.values()), "a narrower type is never slower"
    assert all(1e9 < rate < 1e16 for rate in peaks.values()), "operations per second, not GFLOPS"
    assert 1e9 < target.memory.bandwidth < 1e13, "bytes per second, not GB/s"


@pytest.mark.parametrize(
    ("tag", "sm"),
    [("v100", 70), ("t4", 75), ("a100", 80), ("jetson-agx-orin", 87), ("l4", 89), ("h100", 90), ("jetson-thor", 110)],
)
def test_compute_capabilities(tag: str, sm: int) -> None:
    arch = Registry().get(tag).arch
    assert arch.kind == "cuda"
    assert arch.sm == sm
    # TensorRT-RTX 1.7 builds for no capability between these and for none of Jetson or Hopper.
    assert ("tensorrt-rtx" in Registry().get(tag).compilers) == (sm in (75, 80, 86, 89, 120, 121))


def test_llvm_knows_the_cpus() -> None:
    tvm = pytest.importorskip("tvm")
    list_cpus = tvm.get_global_func("target.llvm_get_cpu_archlist")
    list_features = tvm.get_global_func("target.llvm_get_cpu_features")
    for target in Registry():
        if target.arch.kind != "cpu":
            continue
        llvm = {"kind": "llvm", "mtriple": f"{target.arch.isa.replace('-', '_')}-linux-gnu"}
        assert target.arch.mcpu in list_cpus(tvm.target.Target(llvm)), target.tag
        features = list_features(tvm.target.Target({**llvm, "mcpu": target.arch.mcpu}))
        if target.arch.isa == "aarch64":
            # What the code generator may use, a host must be asked for.
            assert ("dotprod" in features) == ("asimddp" in target.arch.cpuinfo) == ("int8" in target.precisions)
            assert ("fullfp16" in features) == ("asimdhp" in target.arch.cpuinfo) == ("fp16" in target.precisions)
            assert ("lse" in features) == ("atomics" in target.arch.cpuinfo)
        else:
            assert ("avx512vnni" in features) == ("avx512_vnni" in target.arch.cpuinfo)
            assert "avx2" in features
            assert "avx2" in target.arch.cpuinfo


def test_unknown_tag_names_the_nearest() -> None:
    with pytest.raises(TargetError, match='no target "cortex-a75"; did you mean "cortex-a7') as caught:
        Registry().get("cortex-a75", where="recipe.toml:9: target[0].tag")
    assert str(caught.value).startswith("recipe.toml:9: target[0].tag: ")
    assert "modelforge targets" in str(caught.value)


def test_nearest_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local, user, more = (tmp_path / name for name in ("targets", "user", "more"))
    for folder, title in ((local, "local"), (user, "user"), (more, "more")):
        folder.mkdir()
        (folder / "t4.toml").write_text(GPU.replace("A GPU", title))
    (more / "my-board.toml").write_text(GPU)
    assert Registry().get("t4").title == "NVIDIA T4"
    monkeypatch.setenv("MODELFORGE_TARGETS", f"{user}:{more}")
    assert Registry().get("t4").title == "user"
    assert Registry([local]).get("t4").title == "local"
    assert Registry([local]).get("a100").path.parent == builtin_folder()
    assert Registry().get("my-board").tag == "my-board"
    assert "my-board" in Registry().tags()


def test_missing_user_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELFORGE_TARGETS", str(tmp_path / "nowhere"))
    with pytest.raises(TargetError, match=r"\$MODELFORGE_TARGETS.*nowhere: there is no such folder"):
        Registry()


def test_recipe_folder_without_targets_is_fine(tmp_path: Path) -> None:
    assert Registry([tmp_path / "targets"]).get("t4").path.parent == builtin_folder()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema = 1", "schema = 2", "gpu.toml:2: schema"),
        ("tier", "teir", 'gpu.toml:5: teir: unknown key "teir"; did you mean "tier"?'),
        ('tier = "cloud"', 'tier = "server"', "gpu.toml:5: tier: input should be 'device', 'edge' or 'cloud'"),
        ('["fp16"]', '["fp8"]', "gpu.toml:7: precisions[0]: input should be 'fp32', 'fp16', 'int8' or 'mixed'"),
        ('["tensorrt"]', "[]", "gpu.toml:6: compilers"),
        ("sm = 75", "smm = 75", 'gpu.toml:11: arch.smm: unknown key "smm"; did you mean "sm"?'),
        ("sm = 75", "", "gpu.toml:9: arch.sm: this key is required and missing"),
        ("sm = 75", "sm = 7.5", "gpu.toml:11: arch.sm: should be a whole number (got 7.5)"),
        ("sm = 75", "sm = 7", "75 for 7.5"),
        ("sm = 75", 'sm = "75"', "arch.sm: should be a whole number"),
        ("sm = 75", "sm = 75\ncores = 4", 'unknown key "cores"; known: dla, kind, sm'),
        ('kind = "cuda"', 'kind = "cud"', 'gpu.toml:10: arch.kind: unknown kind "cud"; did you mean "cuda"?'),
        ('kind = "cuda"', "", "gpu.toml:9: arch.kind: this key is required and missing"),
        ('kind = "cuda"\nsm = 75', 'kind = "ascend"\ncores = 2', "arch.soc_version: this key is required and missing"),
        ('kind = "cuda"\nsm = 75', 'kind = "rockchip"\ncores = 2', "arch.platform: this key is required and missing"),
        ('kind = "cuda"\nsm = 75', 'kind = "cpu"\nisa = "arm64"', "arch.isa: input should be 'x86-64' or 'aarch64'"),
        ("bandwidth = 1.0", "bandwidth = inf", "memory.bandwidth: input should be a finite number"),
        ("bytes = 1", "bytes = 0", "memory.bytes: input should be greater than 0"),
        ("[memory]", "[memory", "gpu.toml: cannot be read as TOML"),
    ],
)
def test_faults_of_a_profile(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "gpu.toml"
    path.write_text(GPU)
    load_target(path)
    assert old in GPU
    path.write_text(GPU.replace(old, new))
    with pytest.raises(TargetError) as caught:
        load_target(path)
    assert said in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_file_name_must_be_a_tag(tmp_path: Path) -> None:
    shutil.copy(builtin_folder() / "t4.toml", tmp_path / "My_T4.toml")
    with pytest.raises(TargetError, match='no target tag: "My_T4"'):
        load_target(tmp_path / "My_T4.toml")


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "t4.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TargetError, match="cannot be read as TOML"):
        load_target(tmp_path / "t4.toml")


def test_facts_leave_out_prose(tmp_path: Path) -> None:
    shutil.copy(builtin_folder() / "t4.toml", tmp_path / "t4.toml")
    path = tmp_path / "t4.toml"
    before = load_target(path).facts()
    path.write_text(path.read_text().replace("NVIDIA T4", "A card").replace("320e9", "300e9"))
    assert load_target(path).facts() == before
    path.write_text(path.read_text().replace("sm = 75", "sm = 86"))
    assert load_target(path).facts() != before
