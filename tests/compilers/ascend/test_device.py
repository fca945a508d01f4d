"""Running on an NPU, with fakes of ais_bench and of pyACL that follow their documented calls.

A fake "model" gives the sum of each sample, so that order, padding and gears show in the outputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelforge.compilers.ascend import AscendCompiler, device
from modelforge.compilers.protocol import RunJob
from modelforge.errors import BuildError
from tests.compilers.ascend import double
from tests.compilers.ascend.models import target

COMPILER = AscendCompiler()

AIS_BENCH = '''
import json, numpy as np
LOG = {log!r}
class InferSession:
    def __init__(self, device_id, model_path):
        assert open(model_path, "rb").read(4) == b"IMOD"
        self.path = model_path
    def infer(self, feeds, mode="static"):
        """Modes: static, {spelled}batch, {spelled}hw, {spelled}dims."""
        assert mode in ("static", "{spelled}batch", "{spelled}hw", "{spelled}dims"), mode
        with open(LOG, "a") as stream:
            shapes = [list(each.shape) for each in feeds]
            stream.write(json.dumps([self.path, mode, shapes, str(feeds[0].dtype)]) + "\\n")
        return [sum(each.reshape(len(each), -1).astype(np.float32).sum(1) for each in feeds)[:, None]]
'''

ACL = """
import ctypes, types
SOC = {soc!r}
memory, datasets, taken = {{}}, {{}}, [0]
state = {{"gear": None}}
def new(thing, table):
    taken[0] += 1
    table[taken[0]] = thing
    return taken[0]
def get_soc_name(): return SOC
def init(): return 0
def create_data_buffer(pointer, size): return (pointer, size)
def destroy_data_buffer(buffer): return 0
def copy(target, size, source, count, kind):
    assert kind in (1, 2) and count <= size
    memory[target][:count] = memory[source][:count]
    return 0
rt = types.SimpleNamespace(
    set_device=lambda place: 0, create_context=lambda place: (1, 0), memcpy=copy,
    malloc=lambda size, policy: (new(bytearray(size), memory), 0), free=lambda pointer: memory.pop(pointer) and 0,
    malloc_host=lambda size: (new(bytearray(size), memory), 0), free_host=lambda pointer: memory.pop(pointer) and 0)
util = types.SimpleNamespace(
    bytes_to_ptr=lambda data: new(bytearray(data), memory),
    ptr_to_bytes=lambda pointer, size: bytes(memory[pointer][:size]))
def add(dataset, buffer):
    datasets[dataset].append(buffer)
    return dataset, 0
def set_batch(model, dataset, place, batch):
    assert place == 1
    state["gear"] = batch
    return 0
def execute(model, inputs, outputs):
    import numpy as np
    batch = state["gear"]
    x = np.frombuffer(memory[datasets[inputs][0][0]], np.float32).reshape(4, -1)[:batch]
    y = x.sum(1).astype(np.float32).tobytes()
    memory[datasets[outputs][0][0]][:len(y)] = y
    return 0
mdl = types.SimpleNamespace(
    load_from_file=lambda path: (7, 0), create_desc=lambda: 8, get_desc=lambda description, model: 0,
    get_num_inputs=lambda description: 2, get_num_outputs=lambda description: 1,
    get_input_size_by_index=lambda description, place: [4 * 12 * 4, 8][place],
    get_output_size_by_index=lambda description, place: 16,
    create_dataset=lambda: new([], datasets), add_dataset_buffer=add, execute=execute,
    get_dataset_num_buffers=lambda dataset: len(datasets[dataset]),
    get_dataset_buffer=lambda dataset, place: datasets[dataset][place],
    destroy_dataset=lambda dataset: datasets.pop(dataset) and 0,
    get_input_index_by_name=lambda description, name: (1, 0 if name == "ascend_mbatch_shape_data" else 1),
    set_dynamic_batch_size=set_batch,
    get_cur_output_dims=lambda description, place: ({{"dims": [state["gear"], 1]}}, 0),
    get_output_data_type=lambda description, place: 0)
"""


class Npu:
    """A host with an NPU, as far as files and Python modules tell."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.made = double.install(folder)
        self.modules = folder / "modules"
        self.modules.mkdir()
        self.log = folder / "infer.log"
        set_env = self.made.root / "set_env.sh"
        set_env.write_text(set_env.read_text() + f"export PYTHONPATH={self.modules}\n")
        (folder / "dev").mkdir()
        (folder / "dev" / "davinci0").touch()
        patch.setattr(device, "_DEVICES", folder / "dev")
        patch.setenv("MODELFORGE_ATC", str(self.made.root))
        patch.setenv("MODELFORGE_ATC_PYTHON", sys.executable)
        self.acl()

    def acl(self, soc: str = "Ascend310P3") -> None:
        (self.modules / "acl.py").write_text(ACL.format(soc=soc))
        device._probe.cache_clear()

    def ais_bench(self, spelled: str = "dym") -> None:
        package = self.modules / "ais_bench" / "infer"
        package.mkdir(parents=True)
        for folder in (package.parent, package):
            (folder / "__init__.py").touch()
        (package / "interface.py").write_text(AIS_BENCH.format(log=str(self.log), spelled=spelled))
        device._probe.cache_clear()

    @property
    def inferred(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Npu:
    return Npu(tmp_path, monkeypatch)


def job(folder: Path, models: list[dict[str, Any]], samples: np.ndarray[Any, Any], batch: int, **more: Any) -> RunJob:
    shape = more.get("shape", ["batch", 3, 2, 2])
    manifest = {
        "models": models,
        "inputs": [{"name": "x", "dtype": "float32", "shape": shape}],
        "outputs": ["y"],
        "aipp": more.get("aipp", {}),
    }
    files = {"main.json": folder / "main.json"}
    files["main.json"].write_text(json.dumps(manifest))
    for model in models:
        files[model["file"]] = folder / model["file"]
        files[model["file"]].write_bytes(b"IMOD")
    np.savez(folder / "samples.npz", x=samples)
    workdir = folder / "run"
    workdir.mkdir()
    return RunJob(files, models[0]["file"], target(), folder / "samples.npz", batch, folder / "out.npz", workdir, 60.0)


GEARS = [{"file": "main.om", "gears": "dynamic_batch_size", "sizes": [{"batch": 1}, {"batch": 4}]}]
FIXED = [{"file": f"main_b{size}.om", "gears": None, "sizes": [{"batch": size}]} for size in (2, 4)]
SAMPLES = np.arange(7 * 12, dtype=np.float32).reshape(7, 3, 2, 2)
SUMS = SAMPLES.reshape(7, -1).sum(1)[:, None]


class TestChip:
    def test_the_target_s_own_chip_is_device_evidence(self, npu: Npu) -> None:
        assert COMPILER.runner(target()) == "device"
        assert COMPILER.runner(target("ascend-310b4")) is None
        assert COMPILER.runner(target("t4")) is None

    def test_another_chip_is_none(self, npu: Npu) -> None:
        npu.acl("Ascend910B3")
        assert COMPILER.runner(target()) is None
        assert COMPILER.runner(target("ascend-910b3")) == "device"

    def test_without_pyacl_there_is_none(self, npu: Npu) -> None:
        (npu.modules / "acl.py").write_text("raise ImportError('libascendcl.so')")
        assert COMPILER.runner(target()) is None

    def test_without_a_device_file_nothing_is_asked(self, npu: Npu, tmp_path: Path) -> None:
        (tmp_path / "dev" / "davinci0").unlink()
        (npu.modules / "acl.py").unlink()
        assert COMPILER.runner(target()) is None

    def test_running_elsewhere_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="no NPU of ascend-310p3"):
            COMPILER.run(job(tmp_path, GEARS, SAMPLES, 4))


class TestAisBench:
    @pytest.mark.parametrize("spelled", ["dym", "dyn"])
    def test_gears_in_the_installed_one_s_words(self, spelled: str, npu: Npu, tmp_path: Path) -> None:
        npu.ais_bench(spelled)
        run = job(tmp_path, GEARS, SAMPLES, 4)
        ran = COMPILER.run(run)
        assert ran.evidence == "device"
        assert ran.latency["evidence"] == "device"
        assert ran.latency["p50_ms"] > 0
        np.testing.assert_allclose(np.load(run.outputs)["y"], SUMS)
        batches = [call[2][0][0] for call in npu.inferred][:4]
        assert batches == [4, 1, 1, 1]
        assert npu.inferred[0][1] == f"{spelled}batch"

    def test_one_file_a_size_and_a_short_batch_filled_up(self, npu: Npu, tmp_path: Path) -> None:
        npu.ais_bench()
        run = job(tmp_path, FIXED, SAMPLES, 8)
        COMPILER.run(run)
        np.testing.assert_allclose(np.load(run.outputs)["y"], SUMS)
        assert [(Path(call[0]).name, call[2][0][0]) for call in npu.inferred][:3] == [
            ("main_b4.om", 4),
            ("main_b2.om", 2),
            ("main_b2.om", 2),
        ]

    def test_aipp_gets_the_pixels_back(self, npu: Npu, tmp_path: Path) -> None:
        npu.ais_bench()
        pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 2, 2)).astype(np.float32)
        section = {"source": "rgb888", "colour": "bgr", "mean": [10.0, 20.0, 30.0], "std": [2.0, 3.0, 4.0]}
        mean, std = (np.array(section[name], np.float32).reshape(1, 3, 1, 1) for name in ("mean", "std"))
        one = [{"file": "main.om", "gears": None, "sizes": [{}]}]
        run = job(tmp_path, one, (pixels - mean) / std, 1, aipp={"x": section}, shape=[1, 3, 2, 2])
        COMPILER.run(run)
        np.testing.assert_allclose(np.load(run.outputs)["y"][:, 0], pixels.reshape(2, -1).sum(1))
        assert npu.inferred[0][2:] == [[[1, 2, 2, 3]], "uint8"]

    def test_a_failure_on_the_device_is_told(self, npu: Npu, tmp_path: Path) -> None:
        npu.ais_bench()
        run = job(tmp_path, GEARS, SAMPLES, 4)
        run.files["main.om"].write_bytes(b"nothing")
        with pytest.raises(BuildError, match="running on the NPU: AssertionError"):
            COMPILER.run(run)
        assert not run.outputs.exists()

    def test_two_variants_are_timed_side_by_side(self, npu: Npu, tmp_path: Path) -> None:
        npu.ais_bench()
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        first, second = job(tmp_path / "a", GEARS, SAMPLES, 4), job(tmp_path / "b", FIXED, SAMPLES, 4)
        times = COMPILER.race(first, second)
        assert times is not None
        assert all(time > 0 for time in times)
        files = [Path(call[0]).parent.name for call in npu.inferred]
        assert files[:4] == ["first", "second", "first", "second"]


def test_pyacl_where_there_is_no_ais_bench(npu: Npu, tmp_path: Path) -> None:
    run = job(tmp_path, GEARS, SAMPLES, 4)
    ran = COMPILER.run(run)
    assert "pyACL" in ran.notes[0]
    np.testing.assert_allclose(np.load(run.outputs)["y"], SUMS)
