"""The compiler as the forge sees it: probe, supports, compile with the double, read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from modelforge.compilers.ascend import AscendCompiler
from modelforge.compilers.protocol import Compiled, CompileJob, Missing, Toolchain, Wanted
from modelforge.errors import ModelForgeError, ToolchainMissing, UnsupportedError
from modelforge.graph.inspect import inspect_model
from modelforge.options import PreprocessSection
from modelforge.recipe import Dim
from modelforge.target import AscendArchitecture, Target
from tests.compilers.ascend import double
from tests.compilers.ascend.double import Double
from tests.compilers.ascend.models import conv_model, target

COMPILER = AscendCompiler()
BATCH = {"batch": Dim(values=(1, 4))}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Double:
    made = double.install(tmp_path)
    monkeypatch.setenv("MODELFORGE_ATC", str(made.root))
    return made


def job(tmp_path: Path, model: Path, precision: str = "fp16", tag: str = "ascend-310p3", **more: Any) -> CompileJob:
    shape = more.pop("shape", (1, 3, 8, 8))
    workdir = tmp_path / f"work-{precision}-{tag}"
    workdir.mkdir()
    given = {"dims": BATCH, "timeout": 60.0, **more}
    return CompileJob(model, target(tag), precision, {"x": shape}, workdir=workdir, **given)


def ascend_model(path: Path, batch: int | str = "batch", keep: str = "") -> Path:
    """The conv model in the dialect's own form, written by the dialect."""
    import numpy as np

    from modelforge.quantize.calibrate import calibrate
    from modelforge.quantize.dialects.ascend import to_ascend
    from modelforge.quantize.qdq import quantize_model

    plain = conv_model(path.parent / "plain.onnx", batch)
    feeds = ({"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(4))
    quantize_model(plain, calibrate(plain, feeds), path.parent / "qdq", dialect="ascend")
    kept = {keep: "for a test"} if keep else {}
    to_ascend(path.parent / "qdq" / "model.onnx", path.parent, keep=kept)
    return path.parent / "model.onnx"


class TestProbe:
    def test_a_double_is_visible(self, made: Double) -> None:
        assert COMPILER.probe() == Toolchain({"cann": "8.2.RC1-double", "atc": "local"})

    def test_without_atc_it_says_how_to_get_one(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("MODELFORGE_ATC", str(tmp_path / "gone"))
        found = COMPILER.probe()
        assert isinstance(found, Missing)
        assert "quay.io/ascend/cann:" in found.fix
        with pytest.raises(ToolchainMissing):
            COMPILER.compile(job(tmp_path, conv_model(tmp_path / "m.onnx")))


class TestSupports:
    def rules(
        self, model: Path, tag: str = "ascend-310p3", precision: str = "fp16", shape: Any = (1, 3, 8, 8), **more: Any
    ) -> list[str]:
        chosen = more.pop("target", target(tag))
        found = COMPILER.supports(
            inspect_model(model), chosen, precision, {"x": shape}, more.pop("dims", BATCH), **more
        )
        assert all(each.what and each.fix and each.source for each in found), found
        return [each.rule for each in found]

    def test_nothing_against_a_good_model(self, made: Double, tmp_path: Path) -> None:
        model = conv_model(tmp_path / "m.onnx", "batch", opset=17)
        for tag in ("ascend-310", "ascend-310p3", "ascend-310b4", "ascend-910b3", "ascend-910a"):
            for precision in ("fp16", "int8", "mixed"):
                assert self.rules(model, tag, precision, ("batch", 3, 8, 8)) == []

    @pytest.mark.parametrize(
        "soc", ["Ascend910B", "Ascend310P", "Ascend910", "ascend310p3", "310P3", "Ascend310P3;reboot", ""]
    )
    def test_a_chip_is_never_guessed(self, soc: str, tmp_path: Path) -> None:
        arch = AscendArchitecture(kind="ascend", soc_version=soc, cores=1)
        assert self.rules(conv_model(tmp_path / "m.onnx"), target=replace(target(), arch=arch)) == ["soc-version"]

    def test_910b_says_which_of_the_two(self, tmp_path: Path) -> None:
        arch = AscendArchitecture(kind="ascend", soc_version="Ascend910B", cores=1)
        facts = inspect_model(conv_model(tmp_path / "m.onnx"))
        (refusal,) = COMPILER.supports(facts, replace(target(), arch=arch), "fp16", {"x": (1, 3, 8, 8)}, {})
        assert "first-generation" in refusal.fix
        assert "Ascend910B1 to B4" in refusal.fix

    def test_opsets(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MODELFORGE_ATC", str(double.install(tmp_path / "old", "6.0.1").root))
        assert self.rules(conv_model(tmp_path / "13.onnx", opset=13)) == []
        assert self.rules(conv_model(tmp_path / "17.onnx", opset=17)) == ["opset"]
        monkeypatch.setenv("MODELFORGE_ATC", str(double.install(tmp_path / "new", "8.0.0").root))
        assert self.rules(conv_model(tmp_path / "17.onnx", opset=17)) == []
        assert self.rules(conv_model(tmp_path / "19.onnx", opset=19)) == ["opset"]
        monkeypatch.setenv("MODELFORGE_ATC", "ssh:")
        assert self.rules(conv_model(tmp_path / "19.onnx", opset=19)) == ["opset"]

    def test_chips_come_and_go_with_cann(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = conv_model(tmp_path / "m.onnx")
        monkeypatch.setenv("MODELFORGE_ATC", str(double.install(tmp_path / "new", "8.5.0").root))
        assert self.rules(model, "ascend-310") == ["cann-version"]
        assert self.rules(model, "ascend-310p3") == []
        monkeypatch.setenv("MODELFORGE_ATC", str(double.install(tmp_path / "old", "5.1.RC2").root))
        assert self.rules(model, "ascend-310") == []
        assert self.rules(model, "ascend-310b4") == ["cann-version"]

    def test_gears(self, made: Double, tmp_path: Path) -> None:
        model = conv_model(tmp_path / "m.onnx", "batch")
        many = {"batch": Dim(values=tuple(range(1, 102)))}
        assert self.rules(model, shape=("batch", 3, 8, 8), dims=many) == ["gears"]
        assert self.rules(model, precision="int8", shape=("batch", 3, 8, 8), dims=many) == []

    def test_what_aipp_cannot_do(self, tmp_path: Path) -> None:
        model = conv_model(tmp_path / "m.onnx", "batch")
        facts = inspect_model(model)

        def rules(
            precision: str = "fp16", shape: Any = ("batch", 3, 8, 8), dims: Any = BATCH, **section: Any
        ) -> list[str]:
            sections = {"x": PreprocessSection.model_validate(section)}
            wanted = Wanted(model, facts, target(), precision, {"x": shape}, dims, {}, sections)
            found = COMPILER.supports_recipe(wanted)
            assert all(each.what.startswith("inputs.x.preprocess: ") and each.fix and each.source for each in found)
            return [each.rule for each in found]

        assert rules() == rules("int8") == []
        assert COMPILER.supports_recipe(Wanted(model, facts, target(), "fp16", {"x": (1, 3, 8, 8)}, {})) == []
        assert rules(size=(9, 8)) == rules("int8", size=(9, 8)) == ["aipp"]
        assert rules(colour="gray") == ["aipp"]
        assert rules(shape=("batch", 3, "side", 8), dims={**BATCH, "side": Dim(values=(8, 16))}) == ["aipp"]

    def test_domains_quantized_models_and_options(self, made: Double, tmp_path: Path) -> None:
        assert self.rules(conv_model(tmp_path / "q.onnx", qdq=True)) == ["operator"] * 2
        other = onnx.load(conv_model(tmp_path / "m.onnx"))
        other.graph.node[0].domain = "acme"
        other.opset_import.append(helper.make_opsetid("acme", 1))
        onnx.save(other, tmp_path / "domain.onnx")
        assert self.rules(tmp_path / "domain.onnx") == ["domain"]
        options = {"precision_mode": "must_keep_origin_dtype"}
        assert self.rules(conv_model(tmp_path / "m.onnx"), precision="int8", options=options) == ["precision-mode"]

    def test_other_hardware(self, tmp_path: Path) -> None:
        assert self.rules(conv_model(tmp_path / "m.onnx"), "t4") == ["architecture"]


class TestCompile:
    def test_fp16_with_gears(self, made: Double, tmp_path: Path) -> None:
        model = conv_model(tmp_path / "in" / "model.onnx", "batch", half=True)
        done = COMPILER.compile(job(tmp_path, model, shape=("batch", 3, 8, 8)))
        assert done.artifact == "main.om"
        assert sorted(done.files) == ["main.json", "main.om"]
        assert done.commands == (
            (
                "atc", "--model=model.onnx", "--framework=5", "--output=main", "--soc_version=Ascend310P3",
                "--input_shape=x:-1,3,8,8", "--dynamic_batch_size=1,4", "--precision_mode=must_keep_origin_dtype",
            ),
        )  # fmt: skip
        assert done.needs == {"cann": ">=8.2.RC1-double", "soc_version": "Ascend310P3"}
        assert "8.2.RC1-double" in done.requires
        assert "not verified on a device" in done.notes
        assert any("2 gears" in note for note in done.notes)
        assert any("msit debug compare -gm MODEL.onnx -om main.om" in note for note in done.notes)
        manifest = json.loads(done.files["main.json"].read_text())
        assert manifest["models"][0]["sizes"] == [{"batch": 1}, {"batch": 4}]
        assert manifest["models"][0]["gears"] == "dynamic_batch_size"

    def test_what_was_run_is_what_is_recorded(self, made: Double, tmp_path: Path) -> None:
        done = COMPILER.compile(job(tmp_path, conv_model(tmp_path / "in" / "model.onnx", half=True)))
        ran = [call["argv"] for call in made.calls if call["argv"] != ["--help"]]
        assert ran == [list(command[1:]) for command in done.commands]
        assert str(tmp_path) not in json.dumps(done.commands) + json.dumps(done.report) + " ".join(done.notes)

    def test_int8_is_one_file_a_size(self, made: Double, tmp_path: Path) -> None:
        model = ascend_model(tmp_path / "in" / "model.onnx")
        done = COMPILER.compile(job(tmp_path, model, "int8", shape=("batch", 3, 8, 8)))
        assert done.artifact == "main.json"
        assert sorted(done.files) == ["main.json", "main_b1.om", "main_b4.om"]
        assert [command[5] for command in done.commands] == ["--input_shape=x:1,3,8,8", "--input_shape=x:4,3,8,8"]
        assert all("--precision_mode=force_fp16" in command for command in done.commands)

    def test_int8_keeps_what_fp16_would_overflow(self, made: Double, tmp_path: Path) -> None:
        model = ascend_model(tmp_path / "in" / "model.onnx", 1, keep="conv")
        done = COMPILER.compile(job(tmp_path, model, "int8"))
        assert "--keep_dtype=keep_dtype.cfg" in done.commands[0]
        assert done.report["files"]["keep_dtype.cfg"] == "conv\nconv/AscendDequant\n"

    def test_a_product_left_in_fp32(self, made: Double, tmp_path: Path) -> None:
        """Where the chip multiplies FP16 only, must_keep_origin_dtype would go to the AI CPU or fail."""
        model = conv_model(tmp_path / "in" / "model.onnx")
        done = COMPILER.compile(job(tmp_path, model))
        assert "--precision_mode=allow_fp32_to_fp16" in done.commands[0]
        assert any("conv is FP32" in note for note in done.notes)
        done = COMPILER.compile(job(tmp_path, model, "fp32", "ascend-910b3"))
        assert "--precision_mode=must_keep_origin_dtype" in done.commands[0]

    def test_aipp(self, made: Double, tmp_path: Path) -> None:
        model = conv_model(tmp_path / "in" / "model.onnx", "batch", half=True)
        section = {"x": PreprocessSection(mean=(127.5,) * 3, std=(127.5,) * 3)}
        done = COMPILER.compile(job(tmp_path, model, shape=("batch", 3, 8, 8), preprocess=section))
        assert "--insert_op_conf=aipp.cfg" in done.commands[0]
        assert "mean_chn_0 : 127" in done.report["files"]["aipp.cfg"]
        manifest = json.loads(done.files["main.json"].read_text())
        assert manifest["aipp"]["x"]["dtype"] == "uint8"

    def test_the_recipe_s_options_reach_atc(self, made: Double, tmp_path: Path) -> None:
        made.drive(variables=["TE_PARALLEL_COMPILER", "MAX_COMPILE_CORE_NUMBER"])
        options = {
            "parallel_compilers": 2, "compile_cores": 1, "op_precision": {"Conv2D": "high_precision"},
            "external_weight": True, "host": "linux-aarch64", "memory_bytes": 8_000_000_000,
        }  # fmt: skip
        done = COMPILER.compile(job(tmp_path, conv_model(tmp_path / "in" / "model.onnx", half=True), options=options))
        (command,) = done.commands
        assert {"--external_weight=1", "--host_env_os=linux", "--host_env_cpu=aarch64"} <= set(command)
        assert done.report["files"]["op_precision.ini"] == "[ByOpType]\nConv2D=high_precision\n"
        assert "weight-weight_0" in done.files
        call = made.calls[-1]
        assert (call["TE_PARALLEL_COMPILER"], call["MAX_COMPILE_CORE_NUMBER"]) == ("2", "1")

    def test_an_old_cann_gets_an_opset_that_it_knows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = double.install(tmp_path, "6.0.1")
        contract = json.loads((made.root / "bin" / "contract.json").read_text()) | {"newest_opset": 13}
        (made.root / "bin" / "contract.json").write_text(json.dumps(contract))
        monkeypatch.setenv("MODELFORGE_ATC", str(made.root))
        model = conv_model(tmp_path / "in" / "model.onnx", opset=17, half=True)
        done = COMPILER.compile(job(tmp_path, model, tag="ascend-310"))
        assert any("opset 13 instead of 17" in note for note in done.notes)

    def test_an_option_that_this_atc_lacks_is_refused_before_it_runs(self, made: Double, tmp_path: Path) -> None:
        contract = json.loads((made.root / "bin" / "contract.json").read_text())
        del contract["options"]["external_weight"]
        (made.root / "bin" / "contract.json").write_text(json.dumps(contract))
        options = {"external_weight": True}
        with pytest.raises(UnsupportedError, match="external_weight"):
            COMPILER.compile(job(tmp_path, conv_model(tmp_path / "in" / "model.onnx", half=True), options=options))
        assert [call["argv"] for call in made.calls] == [["--help"]]

    def test_a_failure_of_one_size_fails_the_variant(self, made: Double, tmp_path: Path) -> None:
        made.drive(code="E20001", message="Failed to compile Op [conv]. (optype: [Conv2D])")
        with pytest.raises(ModelForgeError, match="main_b1") as caught:
            COMPILER.compile(
                job(tmp_path, ascend_model(tmp_path / "in" / "model.onnx"), "int8", shape=("batch", 3, 8, 8))
            )
        assert "conv" in str(caught.value)

    def test_a_qdq_model_is_refused_with_the_reason(self, made: Double, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="no parser for"):
            COMPILER.compile(job(tmp_path, conv_model(tmp_path / "in" / "model.onnx", qdq=True), "int8"))

    def test_a_model_with_data_beside_it(self, made: Double, tmp_path: Path) -> None:
        plain = conv_model(tmp_path / "plain.onnx", half=True)
        (tmp_path / "in").mkdir()
        onnx.save(
            onnx.load(plain), tmp_path / "in" / "model.onnx",
            save_as_external_data=True, location="model.onnx.data", size_threshold=0,
        )  # fmt: skip
        log = tmp_path / "seen"
        set_env = made.root / "set_env.sh"
        set_env.write_text(set_env.read_text() + f"ls > {log}\n")
        COMPILER.compile(job(tmp_path, tmp_path / "in" / "model.onnx"))
        assert log.read_text().split() == ["model.onnx", "model.onnx.data"]


class TestCommand:
    """An existing atc line, pasted into the recipe."""

    @pytest.fixture
    def compiled(self, made: Double, tmp_path: Path) -> Callable[..., Compiled]:
        def run(command: str, precision: str = "fp16") -> Compiled:
            folder = tmp_path / "in"
            model = (
                ascend_model(folder / "m.onnx", 1)
                if precision == "int8"
                else conv_model(folder / "model.onnx", half=True)
            )
            return COMPILER.compile(job(tmp_path, model, precision, options={"command": command}))

        return run

    def test_what_the_recipe_does_not_decide_is_taken_over(self, compiled: Callable[..., Compiled]) -> None:
        done = compiled(
            "atc --model=/home/me/resnet.onnx --framework=5 --output=/data/out --soc_version=Ascend310P3 "
            '--input_shape="x:8,3,8,8" --buffer_optimize=off_optimize --log=error'
        )
        (command,) = done.commands
        assert "--buffer_optimize=off_optimize" in command
        assert "--input_shape=x:1,3,8,8" in command
        assert not any("/home" in word or "/data" in word for word in command)
        assert any("the recipe itself decides: input_shape" in note for note in done.notes)

    @pytest.mark.parametrize(
        ("command", "says"),
        [
            ("atc --soc_version=Ascend310B4", "the command is for Ascend310B4"),
            ("atc --framework=3", "not for an ONNX model"),
            ("atc --insert_op_conf=/home/me/aipp.cfg", "preprocess"),
            ("atc --fusion_switch_file=/home/me/f.cfg", "names a file"),
            ("atc --buf_optimise=x --no_such_thing=y", "no option"),
            ("atc --buffer_optimize=none", "buffer_optimize"),
        ],
    )
    def test_what_contradicts_is_refused(self, command: str, says: str, compiled: Callable[..., Compiled]) -> None:
        with pytest.raises(UnsupportedError) as caught:
            compiled(command)
        assert says in str(caught.value)

    def test_int8_and_high_precision(self, compiled: Callable[..., Compiled]) -> None:
        with pytest.raises(UnsupportedError, match="high_precision"):
            compiled("atc --op_select_implmode=high_precision", "int8")

    def test_nothing_is_read_by_a_shell(self, compiled: Callable[..., Compiled], tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError):
            compiled(f"atc --buffer_optimize=$(touch {tmp_path}/smuggled)")
        assert not (tmp_path / "smuggled").exists()


def test_no_npu_no_device_evidence(made: Double) -> None:
    assert COMPILER.runner(target()) is None
    assert "Ascend310P3" in COMPILER.runner_hint(target())


def test_every_profile_names_an_exact_chip() -> None:
    from modelforge.compilers.ascend.limits import chip_of
    from modelforge.target import Registry

    tags: list[Target] = [each for each in Registry() if isinstance(each.arch, AscendArchitecture)]
    assert len(tags) >= 5
    for each in tags:
        assert isinstance(each.arch, AscendArchitecture)
        assert chip_of(each.arch.soc_version)
        assert each.compilers == ("ascend",)
