"""Tuning, measured for real: on this machine, and over TVM's RPC on a second process that stands for a device."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers.protocol import CompileJob
from modelforge.compilers.tvm import TvmCompiler, _machine, archive, database, devices, runtime, tuner, tuning
from modelforge.compilers.tvm.devices import Device
from modelforge.compilers.tvm.journal import Journal
from modelforge.compilers.tvm.measuring import DeviceFault
from modelforge.errors import BuildError, InputError
from modelforge.store import Store, digest_file
from modelforge.target import CpuArchitecture
from modelforge.toolchains import qemu, worker
from tests.compilers.tvm.models import Built, cortex_a76, make_model, needs_qemu, this_machine, value
from tests.compilers.tvm.rpc_double import WEIGHT

DOUBLE = Path(__file__).parent / "rpc_double.py"
TUNING_DOUBLE = Path(__file__).parent / "tuning_double.py"
SHAPE = (1, 16, 12, 12)


def _net() -> onnx.ModelProto:
    """Two convolutions of 3x3 and one of 1x1: kernels with candidates, whose weights all have one value."""

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(np.full(shape, WEIGHT, np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"]),
        helper.make_node("Relu", ["c2"], ["y"]),
    ]
    weights = [weight("w1", 32, 16, 3, 3), weight("w2", 48, 32, 1, 1)]
    return make_model(nodes, [value("x", list(SHAPE))], [value("y", [1, 48, 12, 12], TensorProto.FLOAT)], weights)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(_net(), path)
    return path


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(model: Path, tmp_path: Path) -> Ask:
    """A request of the child process."""
    arch = this_machine().arch
    assert isinstance(arch, CpuArchitecture)

    count = itertools.count()

    def make(trials: int = 3, port: int | None = None, **more: Any) -> dict[str, Any]:
        folder = tmp_path / f"tvm-{next(count)}"
        where = {"name": "here"} if port is None else {"name": "bench", "host": "127.0.0.1", "port": port, "key": "k"}
        return {
            "model": str(model),
            "folder": str(folder),
            "journal": f"{folder}-trials.jsonl",
            "inputs": {"x": list(SHAPE)},
            "symbol": None,
            "batches": [1],
            "machine": {**_machine(arch), "cores": 1},
            "trials": trials,
            "device": where,
            "isa": arch.isa,
            "choices": {},
            **more,
        }

    return make


def _server(*argv: str) -> Any:
    return _process(sys.executable, *argv)


@contextmanager
def _process(*argv: str) -> Iterator[int]:
    """A server in a process of its own; gives its port, and kills the whole group at the end."""
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "TVM_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "bind to" in line or line.startswith("listening on"):
                yield int(line.rsplit(":", 1)[-1].rsplit(" ", 1)[-1])
                return
        raise AssertionError("the server ended before it listened")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _device(isa: str, folder: Path, *prefix: str) -> Iterator[int]:
    """The server that `devices server` writes for a device, in C."""
    program, *_ = runtime.server_files(isa, Store(), folder)
    with _process(*prefix, str(program), "127.0.0.1", "0", "k") as port:
        yield port


def _double(how: str, first: int = 1) -> Any:
    return _server(str(DOUBLE), "0", "k", how, str(first))


@pytest.fixture
def rpc_server() -> Iterator[int]:
    """The server that a device runs, as its documentation says."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["-m", "tvm.exec.rpc_server", "--host", "127.0.0.1", "--port", str(port), "--key", "k"]
    with _server(*command, "--port-end", str(port + 9)) as bound:
        yield bound


def _assert_measured(answer: dict[str, Any], trials: int) -> None:
    counts = answer["measured"]
    assert counts["measured"] + counts["refused"] + counts["wrong"] == trials
    assert counts["measured"] > 0
    assert sum(kernel["candidates"] for kernel in answer["kernels"]) == trials
    assert all(kernel["untuned_us"] > 0 for kernel in answer["kernels"])


def test_measures_candidates_here_and_counts_them(ask: Ask) -> None:
    answer = tuning.tune(ask(4))
    _assert_measured(answer, 4)
    assert len(answer["kernels"]) == 2
    if answer["kept"]:
        assert answer["choices"]
        assert all(row["ratio"] <= 1 for row in answer["model"])
    else:
        assert answer["choices"] == {}
        assert answer["reason"]


def test_measures_over_rpc(ask: Ask, rpc_server: int) -> None:
    """The server is asked for first, as `devices add --check` does: that must not end it."""
    asked = (devices.ask(Device("bench", "127.0.0.1", rpc_server, "k")) for _ in range(10_000))
    assert next(said for said in asked if "refused" not in said) == devices.READY  # it says "bind" before it listens
    assert devices.ask(Device("bench", "127.0.0.1", rpc_server, "other")) == "has another key"
    _assert_measured(tuning.tune(ask(3, rpc_server)), 3)


def test_measures_on_the_server_without_python(ask: Ask, tmp_path: Path) -> None:
    """It outlives clients that hang up, have another key, or are none; the second session is a new process."""
    arch = this_machine().arch
    assert isinstance(arch, CpuArchitecture)
    with _device(arch.isa, tmp_path / "device") as port:
        there = Device("bench", "127.0.0.1", port, "k")
        assert devices.ask(there) == devices.READY
        assert devices.ask(replace(there, key="other")) == "has another key"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET / HTTP/1.1")
        for _ in range(2):
            _assert_measured(tuning.tune(ask(2, port)), 2)


def test_measures_code_for_another_machine_under_an_emulator(ask: Ask, tmp_path: Path) -> None:
    """The whole path to an ARM device: cross-compiled, linked, sent, run, compared with what this machine computes."""
    needs_qemu()
    emulator = qemu.find()
    assert emulator is not None
    arch = cortex_a76().arch
    assert isinstance(arch, CpuArchitecture)
    machine = {**_machine(arch), "cores": 1}
    with _device("aarch64", tmp_path / "device", *emulator.command(cpu="max")) as port:
        answer = tuning.tune(ask(2, port, machine=machine, isa="aarch64"))
    _assert_measured(answer, 2)
    assert answer["measured"]["wrong"] == 0


def test_what_an_imported_database_decides_is_not_measured_again(ask: Ask) -> None:
    decided = _slowest(ask())
    key = next(key for key in decided if "float32[48,1,1,32]" in key)
    answer = tuning.tune(ask(2, choices={key: decided[key]}))
    assert [kernel["geometry"].count("float32[48,1,1,32]") for kernel in answer["kernels"]] == [0]


def test_the_search_ends_where_candidates_do(ask: Ask) -> None:
    """The model of one kernel, whose rule names a few tiles: more trials than there are candidates."""
    decided = _slowest(ask())
    keys = [key for key in decided if "float32[48,1,1,32]" not in key]
    answer = tuning.tune(ask(1000, choices={key: decided[key] for key in keys}))
    assert 1 <= answer["measured"]["measured"] < 100


def _slowest(request: dict[str, Any]) -> dict[str, str]:
    """Of every tile, the candidate that the rule thinks worst."""
    from modelforge.compilers.tvm import choices, lowering

    module, _, machine = tuning.imported(request)
    with choices.session(listing=True) as said:
        lowering.lower(module, machine)
    return {key: labels[-1] for site in said.sites for key, labels in site.asked.items() if " tile:" in key}


def test_a_slower_database_is_not_kept(ask: Ask) -> None:
    """Never slower than untuned: what was imported is held against the untuned model, and loses."""
    bad = _slowest(ask())
    answer = tuning.tune(ask(1, choices=bad))
    assert answer["kept"] is False
    assert answer["choices"] == {}
    assert answer["model"][0]["ratio"] > 0.99
    assert "no gain" in answer["reason"]


def test_choices_reach_the_code_and_a_stale_one_does_not(ask: Ask) -> None:
    from modelforge.compilers.tvm import worker

    bad = _slowest(ask())
    stale = {"convolution tile: nn.conv2d(of another model)": "[1,1,4]"}
    plain = worker.compile_model(ask())
    tuned, again = (worker.compile_model(ask(choices={**bad, **stale})) for _ in range(2))

    def tiles(answer: dict[str, Any]) -> list[str]:
        return [kernel["note"] for kernel in answer["kernels"]]

    assert plain["applied"] == []
    assert tuned["applied"]
    assert set(tuned["applied"]) <= set(bad)
    assert tiles(tuned) != tiles(plain)
    assert not any(kernel["rule"] in ("generic", "none") for kernel in tuned["kernels"] if kernel["macs"])
    digests = [[digest_file(Path(each)).digest for each in answer["objects"]] for answer in (tuned, again)]
    assert digests[0] == digests[1]


def test_a_model_with_nothing_to_choose_is_an_error(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "plain.onnx"
    relu = make_model([helper.make_node("Relu", ["x"], ["y"])], [value("x", [1, 8])], [value("y", [1, 8])])
    onnx.save(relu, path)
    with pytest.raises(BuildError, match="nothing to tune"):
        tuning.tune(ask(model=str(path), inputs={"x": [1, 8]}))


def test_no_candidate_measured_is_an_error(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason: a search that measured nothing has no result."""
    compiled = tuning._compiled
    calls = 0

    def first_two_only(module: Any, machine: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("LLVM ERROR: out of registers")
        return compiled(module, machine)

    monkeypatch.setattr(tuning, "_compiled", first_two_only)
    with pytest.raises(BuildError, match=r"not one candidate could be measured \(3 tried\).*out of registers"):
        tuning.tune(ask(3))


def test_a_device_that_is_not_there(ask: Ask) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(DeviceFault, match="bench cannot be reached") as caught:
        tuning.tune(ask(3, port))
    assert caught.value.fix


def test_a_device_that_dies(ask: Ask) -> None:
    with _double("dies", 3) as port, pytest.raises(DeviceFault, match="bench failed"):
        tuning.tune(ask(3, port))


def test_a_device_that_hangs(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelforge.compilers.tvm.measuring._PATIENCE", 3.0)
    with _double("hangs", 2) as port, pytest.raises(DeviceFault, match="gave no answer within 3 s"):
        tuning.tune(ask(3, port))


def test_a_device_that_lies_from_the_start(ask: Ask) -> None:
    with _double("lies") as port, pytest.raises(DeviceFault, match="bench gives wrong numbers"):
        tuning.tune(ask(3, port))


def test_candidates_with_other_outputs_are_none(ask: Ask) -> None:
    """The first two libraries are the untuned kernels: they are right, and what follows is not."""
    with _double("lies", 3) as port, pytest.raises(BuildError, match=r"not one.*\(3 tried\).*outputs differ"):
        tuning.tune(ask(3, port))


@pytest.fixture
def crashing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, int], Path]:
    """Let the child processes of a tuning be doubles that crash at some candidates; gives a file that names these."""

    def set_up(how: str, times: int) -> Path:
        marker = tmp_path / "crashed.jsonl"

        def call(function: str, request: dict[str, Any], **rest: Any) -> dict[str, Any]:
            argv = [sys.executable, str(TUNING_DOUBLE), how, str(times), str(marker), function]
            return worker.exchange(argv, request, **rest)

        monkeypatch.setattr(worker, "call", call)
        monkeypatch.setenv("MODELFORGE_HOME", str(tmp_path / "home"))  # nothing was measured before
        return marker

    return set_up


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("segfault", "was killed by SIGSEGV"),
        ("abort", "was killed by SIGABRT"),
        ("hang", "ended with exit code 1 and gave no answer"),
    ],
)
def test_a_candidate_that_crashes_costs_only_itself(
    model: Path, tmp_path: Path, crashing: Callable[[str, int], Path], how: str, said: str
) -> None:
    """It is not tried again, what was measured before it is not measured again, and the others have their turn."""
    marker = crashing(how, 1)
    found = database.read(TvmCompiler().tune(_job(model, tmp_path / "job", trials=4)).database)
    assert len(marker.read_text(encoding="utf-8").splitlines()) == 1
    counts = found.measured
    assert counts.crashed == 1
    assert counts.measured + counts.refused + counts.wrong == 3
    assert said in counts.first_refusal
    assert "(1 crashed)" in found.sentence()
    trials = Journal(tmp_path / "job" / "trials.jsonl").trials
    assert [trial.outcome for trial in trials].count("crashed") == 1
    assert len({(trial.geometry, trial.key, trial.label) for trial in trials}) == len(trials)
    assert {each.name for each in (tmp_path / "job").glob("search-*")} == {"search-0", "search-1"}


def test_candidates_that_all_crash_end_the_tuning(
    model: Path, tmp_path: Path, crashing: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "_MOST_CRASHES", 1)
    crashing("segfault", 99)
    with pytest.raises(BuildError, match=r"2 candidates crashed, the search was given up; .*SIGSEGV"):
        TvmCompiler().tune(_job(model, tmp_path / "job", trials=9))


def test_a_crash_that_is_no_candidates_is_an_error(
    model: Path, tmp_path: Path, crashing: Callable[[str, int], Path]
) -> None:
    """The untuned kernel crashes: nothing is tried in its place."""
    crashing("baseline", 1)
    with pytest.raises(BuildError, match="was killed by SIGSEGV"):
        TvmCompiler().tune(_job(model, tmp_path / "job", trials=9))
    assert not (tmp_path / "job" / "search-1").exists()


def test_a_device_that_dies_at_every_candidate_ends_the_tuning(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both kernels the untuned one is measured, in each session anew; then the session dies."""
    monkeypatch.setenv("MODELFORGE_HOME", str(tmp_path / "home"))
    with _double("dies", 3) as port:
        devices.add(Device("dying", "127.0.0.1", port, "k"))
        with pytest.raises(BuildError, match="dying") as caught:
            TvmCompiler().tune(_job(model, tmp_path / "job", trials=2, device="dying"))
    assert "on dying" in str(caught.value)


def _job(model: Path, folder: Path, **options: Any) -> CompileJob:
    folder.mkdir()
    return CompileJob(model, this_machine(), "fp32", {"x": SHAPE}, {}, folder, 300.0, options)


def test_a_database_is_found_again_for_other_weights(model: Path, tmp_path: Path) -> None:
    """What is measured are sizes: the second model was trained again, and nothing is measured for it."""
    first = TvmCompiler().tune(_job(model, tmp_path / "first", trials=2))
    trained = _net()
    trained.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((32, 16, 3, 3), np.float32), "w1"))
    onnx.save(trained, tmp_path / "trained.onnx")
    second = TvmCompiler().tune(_job(tmp_path / "trained.onnx", tmp_path / "second", trials=2))
    assert digest_file(second.database) == digest_file(first.database)
    assert second.facts["sentence"].endswith("measured before")
    assert (tmp_path / "first" / "search-0").exists()
    assert not (tmp_path / "second" / "search-0").exists()
    found = database.read(first.database)
    assert found.measured.measured > 0
    assert Store().has(digest_file(first.database))
    text = first.database.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert set(json.loads(text)) == {
        "schema", "rules", "machine", "device", "trials", "choices", "kept", "reason", "kernels", "measured", "model",
    }  # fmt: skip


def test_a_tuning_that_was_imported_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on one machine, exported, imported on another: a build there measures nothing."""
    stores = [Store(tmp_path / name) for name in ("here", "there")]
    monkeypatch.setenv("MODELFORGE_HOME", str(stores[0].home))
    first = TvmCompiler().tune(_job(model, tmp_path / "first", trials=2))
    archive.export(stores[0], (), tmp_path / "tunings.json")
    monkeypatch.setenv("MODELFORGE_HOME", str(stores[1].home))
    archive.take_in(stores[1], tmp_path / "tunings.json")
    second = TvmCompiler().tune(_job(model, tmp_path / "second", trials=2))
    assert second.facts["sentence"].endswith("measured before")
    assert second.database.read_bytes() == first.database.read_bytes()


def test_an_imported_database_is_compiled_and_travels_with_the_variant(model: Path, tmp_path: Path) -> None:
    arch = this_machine().arch
    assert isinstance(arch, CpuArchitecture)
    request = {"model": str(model), "folder": str(tmp_path / "tvm"), "inputs": {"x": list(SHAPE)}, "symbol": None,
               "batches": [1], "machine": _machine(arch)}  # fmt: skip
    path = tmp_path / "mine.json"
    kept = database.Database(
        rules="1", machine=_machine(arch), device="pi5", trials=9, choices=_slowest(request), kept=True, reason="",
        kernels=(), measured=database.Measured(measured=9, refused=0, wrong=0), model=(),
    )  # fmt: skip
    path.write_bytes(kept.to_json())
    tuned = TvmCompiler().tune(_job(model, tmp_path / "tune", database=str(path)))
    assert tuned.database.read_bytes() == path.read_bytes()
    compiled = TvmCompiler().compile(_job(model, tmp_path / "tuned", tuning=str(tuned.database)))
    assert compiled.files[database.FILE].read_bytes() == path.read_bytes()
    assert any(note.startswith("tuned on pi5, 9 candidates measured") for note in compiled.notes)
    plain = TvmCompiler().compile(_job(model, tmp_path / "plain"))
    assert digest_file(compiled.files["main.so"]) != digest_file(plain.files["main.so"])
    x = np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)
    outputs = [
        Built(model, this_machine(), each).run({"x": x}, tmp_path / str(place), 1)[0]["y"]
        for place, each in enumerate((compiled, plain))
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-5)


def test_a_database_of_another_machine_is_refused(model: Path, tmp_path: Path) -> None:
    arch = this_machine().arch
    assert isinstance(arch, CpuArchitecture)
    path = tmp_path / "other.json"
    other = database.Database(
        rules="1", machine={**_machine(arch), "vector_bits": 1024}, device="a", trials=1, choices={}, kept=False,
        reason="", kernels=(), measured=database.Measured(measured=1, refused=0, wrong=0), model=(),
    )  # fmt: skip
    path.write_bytes(other.to_json())
    with pytest.raises(InputError, match="another machine: vector_bits 1024, not 128"):
        TvmCompiler().tune(_job(model, tmp_path / "tune", database=str(path)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "choices": {"a": 3}}', "[" * 99999])
def test_what_is_no_database_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="is not a tuning database") as caught:
        database.read(path)
    assert caught.value.where == "tuning.json"
