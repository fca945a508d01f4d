"""Device facts as a file: what was written is read again, and what is wrong is told with its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.bundle.device import SOFTWARE, DeviceFacts, Gpu, read_device_facts, this_device
from modelforge.errors import InputError
from tests.bundle import machines
from tests.bundle.deployed import T4_SERVER


def write(folder: Path, document: Any) -> Path:
    path = folder / "device.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_read_what_a_device_wrote(tmp_path: Path) -> None:
    facts = this_device(machines.lay_out(tmp_path / "root", machines.JETSON))
    assert read_device_facts(write(tmp_path, facts.to_json())) == facts


def test_three_answers_are_kept_apart(tmp_path: Path) -> None:
    document = {
        "schema": 1,
        "gpus": [],
        "versions": {"tensorrt": None, "cann": "8.0.RC1", "tensorrt_rtx": ["1.6", "1.7"]},
    }
    facts = read_device_facts(write(tmp_path, document))
    assert facts.gpus == ()
    assert facts.ascend is None
    assert facts.versions == {"tensorrt": (), "cann": ("8.0.RC1",), "tensorrt_rtx": ("1.6", "1.7")}
    assert "rknn" not in facts.versions
    assert facts.to_json() == {"schema": 1, "name": "", "gpus": [], "notes": [], "versions": document["versions"]}


def test_a_gpu_of_a_file(tmp_path: Path) -> None:
    assert read_device_facts(write(tmp_path, T4_SERVER)).gpus == (Gpu(name="Tesla T4", sm=75),)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("{", "invalid JSON"),
        ("[]", "object"),
        ({"gpu": []}, 'unknown key "gpu"; did you mean "gpus"'),
        ({"gpus": [{"sm": 75, "cc": "7.5"}]}, 'unknown key "gpus.0.cc"'),
        ({"gpus": [{"sm": "7.5"}]}, "gpus.0.sm"),
        ({"gpus": [{}]}, "gpus.0.sm: field required"),
        ({"schema": 2}, "schema"),
        ({"versions": {"tensor_rt": "10"}}, 'unknown key "versions.tensor_rt"; did you mean "tensorrt"'),
        ({"versions": {"cann": 8.0}}, "versions.cann"),
        ({"versions": {"cann": [None]}}, "versions.cann"),
        ({"versions": []}, "versions"),
        ({"cpuinfo": "avx2"}, "cpuinfo"),
        ({"cores": 0}, "cores"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, document: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_device_facts(write(tmp_path, document))
    assert said.lower() in str(caught.value).lower()
    assert "device.json" in str(caught.value)
    assert "--print-device-facts" in str(caught.value)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError):
        read_device_facts(tmp_path / name)


def test_an_endless_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="larger"):
        read_device_facts(write(tmp_path, " " * ((1 << 20) + 1)))


VERSIONS = st.dictionaries(st.sampled_from(sorted(SOFTWARE)), st.lists(st.text(min_size=1), unique=True).map(tuple))


@given(
    st.builds(
        DeviceFacts,
        name=st.text(),
        isa=st.none() | st.text(),
        cpuinfo=st.none() | st.lists(st.text()).map(tuple),
        gpus=st.none() | st.lists(st.builds(Gpu, name=st.text(), sm=st.integers(10, 999))).map(tuple),
        rockchip=st.none() | st.lists(st.text()).map(tuple),
        versions=VERSIONS,
    )
)
def test_any_facts_survive_their_file(facts: DeviceFacts) -> None:
    assert DeviceFacts.model_validate_json(json.dumps(facts.to_json())) == facts
