"""`modelforge ascend` as a user calls it, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

GOOD = "atc --model=a.onnx --framework=5 --output=a --soc_version=Ascend310P3"
BAD = f'{GOOD} --input_format=NHWC --auto_tune_mode="RL,GA" --input_shape="x:${{bs}},3"'
LOG = "ATC run failed\nE19010: No parser is registered for Op [div, optype [ai.onnx::23::Div]].\n"


def modelforge(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "modelforge.cli.main", "ascend", *words]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)


def test_an_accepted_line() -> None:
    done = modelforge("check", GOOD)
    assert done.returncode == 0, done.stderr
    assert "accepted" in done.stdout
    assert "--soc_version" in done.stdout


def test_a_refused_line_is_explained_and_corrected() -> None:
    done = modelforge("check", BAD)
    assert done.returncode == 2
    assert "NHWC" in done.stderr
    assert "how to mend" in done.stderr
    assert done.stdout.rstrip().splitlines()[-1].startswith("atc --model=a.onnx")
    assert 'x:${bs},3"' in done.stdout.rstrip().splitlines()[-1]


def test_json_is_one_document() -> None:
    done = modelforge("check", "-", "--json", text=BAD)
    assert done.returncode == 2
    document = json.loads(done.stdout)
    assert document["accepted"] is False
    assert document["reason"]["code"] == "E10001"
    assert document["options"]["auto_tune_mode"] == "RL,GA"
    assert document["corrected"][0] == "atc"
    assert "--input_format=ND" in document["corrected"]


def test_the_release_and_the_help_of_an_installed_atc(tmp_path: Path) -> None:
    assert modelforge("check", f"{GOOD} --deterministic_level=0", "--cann", "8.5").returncode == 2
    listed = tmp_path / "help.txt"
    listed.write_text("".join(f"  --{name}  text\n" for name in ("model", "framework", "output", "soc_version")))
    assert modelforge("check", GOOD, "--help-text", str(listed)).returncode == 0
    assert modelforge("check", f"{GOOD} --precision_mode_v2=fp16", "--help-text", str(listed)).returncode == 2


def test_bad_input_is_told_in_one_message(tmp_path: Path) -> None:
    for words in (["check", "ls -l"], ["check", GOOD, "--cann", "new"], ["explain-log", str(tmp_path / "none.log")]):
        done = modelforge(*words)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
        assert not done.stdout


def test_a_log_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "atc.log"
    path.write_bytes(b"\xff\xfe not utf-8\n" + LOG.encode())
    done = modelforge("explain-log", str(path))
    assert done.returncode == 0, done.stderr
    assert "unsupported-op" in done.stdout
    assert "Div" in done.stdout
    document = json.loads(modelforge("explain-log", "-", "--json", text=LOG).stdout)
    assert document["class"] == "unsupported-op"
    assert document["code"] == "E19010"
    assert document["ops"] == [{"name": "div", "type": "Div", "opset": 23}]
    success = modelforge("explain-log", "-", "--json", text="ATC run success, welcome to the next use.\n")
    assert json.loads(success.stdout)["failed"] is False


def test_a_deployers_install_is_enough() -> None:
    program = (
        "import sys\n"
        "for heavy in ('numpy', 'onnx', 'onnxruntime', 'torch', 'onnx_ir'): sys.modules[heavy] = None\n"
        "from modelforge.cli.main import main\n"
        f"sys.exit(main(['ascend', 'check', {GOOD!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
