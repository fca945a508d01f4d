"""Machines that are not here, laid out as file systems; NVML and npu-smi as doubles of their documented interfaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelforge.bundle import probes
from modelforge.bundle.device import Gpu, Hexagon, this_device, together
from tests.bundle import machines


def test_an_empty_root_tells_nothing_and_guesses_nothing(tmp_path: Path) -> None:
    facts = this_device(tmp_path)
    assert facts.to_json() == {"schema": 1, "name": "", "gpus": [], "ascend": [], "versions": {}, "notes": []}


def test_a_t4_through_nvml(tmp_path: Path) -> None:
    files = {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n"}
    facts = this_device(machines.lay_out(machines.nvml(tmp_path), files | {"proc/cpuinfo": machines.CPU_X86}))
    assert facts.gpus == (Gpu(name="Tesla T4", sm=75, memory_bytes=16106127360),)
    assert facts.versions == {"nvidia_driver": ("535.104.05",), "cuda": ("12.2",)}
    assert facts.notes == ()


@pytest.mark.parametrize(
    "trace",
    [
        {"proc/driver/nvidia/version": ""},
        {"dev/nvidiactl": ""},
        {"sys/bus/pci/devices/0/vendor": "0x10de\n", "sys/bus/pci/devices/0/class": "0x030200\n"},
    ],
)
def test_a_gpu_whose_driver_says_nothing_is_not_known(tmp_path: Path, trace: dict[str, str]) -> None:
    facts = this_device(machines.lay_out(machines.nvml(tmp_path, init=9), trace))
    assert facts.gpus is None
    assert "does not tell which" in facts.notes[0]


def test_nvidias_sound_card_is_no_gpu(tmp_path: Path) -> None:
    files = {"sys/bus/pci/devices/0/vendor": "0x10de\n", "sys/bus/pci/devices/0/class": "0x040300\n"}
    assert this_device(machines.lay_out(tmp_path, files)).gpus == ()


def test_a_library_that_is_no_nvml(tmp_path: Path) -> None:
    files = {"usr/lib/libnvidia-ml.so.1": b"not a library", "dev/nvidia0": ""}
    assert this_device(machines.lay_out(tmp_path, files)).gpus is None


def test_a_jetson(tmp_path: Path) -> None:
    facts = this_device(machines.lay_out(tmp_path, machines.JETSON))
    name = "NVIDIA Jetson AGX Orin Developer Kit"
    assert facts.name == name
    assert facts.gpus == (Gpu(name=name, sm=87, memory_bytes=64349200 * 1024),)
    assert facts.cpuinfo == ("asimd", "fp"), "flags that every core has"
    assert facts.versions == {
        "l4t": ("36.4.3",),
        "jetpack": ("6.2+b77",),
        "nvidia_driver": ("540.4.0",),
        "tensorrt": ("10.3.0.30-1+cuda12.5",),
    }


def test_a_jetson_without_the_jetpack_package_tells_its_major_number(tmp_path: Path) -> None:
    files = dict(machines.JETSON)
    del files["var/lib/dpkg/status"]
    versions = this_device(machines.lay_out(tmp_path, files)).versions
    assert versions["jetpack"] == ("6",)
    assert versions["tensorrt"] == ("10.3.0",)


def test_an_rk3588_board(tmp_path: Path) -> None:
    facts = this_device(machines.lay_out(tmp_path, machines.ROCK_5B))
    assert facts.rockchip == ("rk3588",)
    assert facts.qualcomm == ()
    assert facts.versions == {"rknn": ("2.3.2",), "rknpu_driver": ("0.9.8",)}


@pytest.mark.parametrize(
    ("compatible", "found"),
    [
        ("a,b\0rockchip,rk3588s\0", ("rk3588",)),
        ("a,b\0rockchip,rk3568\0", ("rk3566",)),
        ("a,b\0rockchip,rk9999\0", None),
        ("raspberrypi,5-model-b\0brcm,bcm2712\0", ()),
    ],
)
def test_rockchip_names(compatible: str, found: tuple[str, ...] | None) -> None:
    assert probes.rockchip(tuple(compatible.split("\0")), "aarch64") == found


def test_without_a_device_tree_only_a_pc_is_known_to_be_none() -> None:
    assert probes.rockchip(None, "x86-64") == ()
    assert probes.qualcomm(None, "aarch64") is None


def test_a_phone(tmp_path: Path) -> None:
    facts = this_device(machines.lay_out(tmp_path, machines.PHONE))
    assert facts.qualcomm == (Hexagon(soc="sm8550", htp_arch=73, soc_model=43),)
    assert facts.versions == {"qnn": ("2.51.0",)}


def test_the_qualcomm_table_agrees_with_the_profiles() -> None:
    from modelforge.target import QualcommArchitecture, Registry

    profiles = {
        (target.arch.htp_arch, target.arch.soc_model)
        for target in Registry()
        if isinstance(target.arch, QualcommArchitecture)
    }
    assert profiles <= {
        (found[0]["htp_arch"], found[0]["soc_model"])
        for name in ("sm8350", "qcm6490", "sm8450", "sm8550", "qcs9100", "sm8650", "sm8750")
        if (found := probes.qualcomm((f"qcom,{name}",), "aarch64"))
    }


@pytest.mark.parametrize(("shown", "soc"), [("310P3", "Ascend310P3"), ("910B4", "Ascend910B4"), ("910A", "Ascend910A")])
def test_an_atlas_server(tmp_path: Path, shown: str, soc: str) -> None:
    root = machines.lay_out(tmp_path / "root", machines.ATLAS)
    facts = this_device(root, npu_smi=machines.npu_smi(tmp_path, shown))
    assert facts.ascend == (soc,)
    assert facts.versions == {"cann": ("8.0.RC3",)}


@pytest.mark.parametrize(("shown", "code"), [("Ascend910", 0), ("310P3", 1)])
def test_an_ascend_that_does_not_tell_its_name(tmp_path: Path, shown: str, code: int) -> None:
    """The bare family name is no soc_version: `Ascend910B` without a digit is another chip than the 910B family."""
    root = machines.lay_out(tmp_path / "root", machines.ATLAS)
    facts = this_device(root, npu_smi=machines.npu_smi(tmp_path, shown, code))
    assert facts.ascend is None
    assert "npu-smi" in facts.notes[0]


def test_npu_smi_is_not_started_where_no_ascend_is(tmp_path: Path) -> None:
    (tmp_path / "npu-smi").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "npu-smi").chmod(0o755)
    assert this_device(tmp_path / "root", npu_smi=str(tmp_path / "npu-smi")).ascend == ()
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    "place", ["cann/x86_64-linux", "ascend-toolkit/latest/x86_64-linux", "nnrt/latest/x86_64-linux"]
)
def test_where_cann_tells_its_version(tmp_path: Path, place: str) -> None:
    name = "ascend_nnrt_install.info" if "nnrt" in place else "ascend_toolkit_install.info"
    root = machines.lay_out(tmp_path, {f"usr/local/Ascend/{place}/{name}": "package_name=x\nversion=8.5.0\n"})
    assert probes.ascend(root).versions == {"cann": "8.5.0"}


def test_the_longest_library_name_has_the_version(tmp_path: Path) -> None:
    names = ["libnvinfer.so.10", "libnvinfer.so.10.13.3", "libtensorrt_rtx.so.1", "libtensorrt_rtx.so.1.7.1"]
    root = machines.lay_out(tmp_path, {f"usr/lib/x86_64-linux-gnu/{name}": "" for name in names})
    assert probes.libraries(root) == {"tensorrt": "10.13.3", "tensorrt_rtx": "1.7.1"}


def test_a_link_with_a_larger_major_number_says_less(tmp_path: Path) -> None:
    """Names sort as text: `so.9` after `so.10.3.0`, and only the longest is the file."""
    root = machines.lay_out(tmp_path, {f"usr/lib/{name}": "" for name in ("libnvinfer.so.9", "libnvinfer.so.10.3.0")})
    assert probes.libraries(root) == {"tensorrt": "10.3.0"}


def test_of_one_installation_the_more_exact_version_is_kept() -> None:
    """A library's name (10.3.0) and Python's package (10.3.0.30) are one; 10.13.3 beside them is another."""
    told = [{"tensorrt": "10.3.0"}, {"tensorrt": "10.3.0.30", "cuda": "12.2"}, {"tensorrt": "10.13.3"}]
    assert together(told) == {"tensorrt": ("10.3.0.30", "10.13.3"), "cuda": ("12.2",)}


def test_this_machine() -> None:
    """The real thing: what is known for sure of any machine that runs these tests."""
    facts = this_device()
    assert facts.isa in ("x86-64", "aarch64")
    assert facts.cpuinfo
    assert facts.memory_bytes is not None
    assert facts.memory_bytes > 1 << 28
    assert facts.versions["glibc"][0].startswith("2.")
    assert facts.versions["glibcxx"][0].startswith("3.4.")
    import onnxruntime

    assert onnxruntime.__version__ in facts.versions["onnxruntime"]
