"""Instructions that one inference executes on aarch64, TVM's variants beside ONNX Runtime's own aarch64 build.

    python benchmarks/tvm_instructions.py [--target cortex-a76] [--precisions fp32 int8] [--work FOLDER] [MODEL ...]

Both run under the same qemu with a counter of guest instructions, one thread: the figure is the difference between a
run of several inferences and a run of one, divided. It is exact and does not depend on this machine. Instructions are
not time: an instruction that waits for memory counts like one that does not. Needs Debian's qemu-user and gcc, and root
for the arm64 packages (``arm64_python.py``).

Limits (issue 5): FP32 1.0 of ONNX Runtime's (geometric mean); INT8 .45 of our FP32 on convolutional models. INT8 stands
beside ONNX Runtime's INT8 too: SDOT does 16 multiply-adds an instruction, so INT8 cannot take less than .0625 for each,
and our FP32 takes some .12 for each of a 3x3 convolution by Winograd.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from arm64_python import ONNXRUNTIME, make
from tvm_cpu import compile_it
from tvm_models import MODELS, Model

from modelforge.compilers.tvm import ARTIFACT
from modelforge.target import Registry

FEW = 2
ENOUGH = 600.0
"""Millions of instructions that the runs of a pair differ by, at least about: starting Python varies by one or two."""
HERE = Path(__file__).parent
ORT = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
feed = {session.get_inputs()[0].name: numpy.load(sys.argv[3])}
for _ in range(int(sys.argv[4])):
    session.run(None, feed)
"""


class Counter:
    """Programs for aarch64 under qemu, counted."""

    def __init__(self, folder: Path, cpu: str) -> None:
        self.root, self.site = make(folder)
        self.cpu = cpu
        self.imported = False
        self.plugin = folder / "guest_counter.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", str(HERE / "guest_counter.c"), "-o", self.plugin], check=True)

    def count(self, *command: str) -> int:
        qemu = ["qemu-aarch64", "-cpu", self.cpu, "-L", str(self.root), "-plugin", str(self.plugin)]
        environment = {"PATH": os.environ["PATH"], "TVM_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        said = subprocess.run([*qemu, *command], env=environment, check=True, capture_output=True, text=True).stderr
        found = re.search(r"^instructions (\d+)$", said, re.MULTILINE)
        assert found is not None, said
        return int(found[1])

    def variant(self, model: Model, folder: Path) -> float:
        """Millions of instructions of one inference; the runner's start, and its warm-up, are in both counts."""
        program = [str(folder / "files" / "run"), "-o", str(folder)]
        data = [str(folder / "files" / ARTIFACT), f"{model.input}={folder / 'x.npy'}"]
        counts = [self.count(*program, "-r", str(rounds), *data) for rounds in (FEW, FEW + 2)]
        return (counts[1] - counts[0]) / 2 / 1e6

    def onnxruntime(self, model: Path, data: Path, expected: float) -> float:
        """The same of ONNX Runtime; ``expected`` says how many inferences make a difference worth counting."""
        python = str(self.root / "usr" / "bin" / "python3.11")
        arguments = [python, "-c", ORT, str(self.site), str(model), str(data)]
        more = max(1, min(60, round(ENOUGH / expected)))
        if not self.imported:
            self.count(*arguments, "1")  # Python compiles what it imports once
            self.imported = True
        counts = [self.count(*arguments, str(rounds)) for rounds in (FEW, FEW + more)]
        return (counts[1] - counts[0]) / more / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--target", default="cortex-a76")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "int8"), default=["fp32"])
    parser.add_argument("--work", type=Path, help="keep prepared models and the arm64 Python here between runs")
    options = parser.parse_args()
    target = Registry().get(options.target)
    chosen = [model for model in MODELS if not options.models or model.name in options.models]
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        counter = Counter(work / "arm64", getattr(target.arch, "qemu_cpu", None) or "max")
        print(f"{target.tag}, CPU model {counter.cpu}; millions of instructions an inference; peer {ONNXRUNTIME}")
        ratios: dict[str, list[float]] = {"fp32 / ONNX Runtime": [], "int8 / fp32": [], "int8 / ONNX Runtime int8": []}
        for model in chosen:
            source = model.fp32(work)
            built = compile_it(model, "fp32", target, work)
            ours = counter.variant(model, built["folder"])
            theirs = counter.onnxruntime(source, built["folder"] / "x.npy", ours)
            ratios["fp32 / ONNX Runtime"].append(ours / theirs)
            line = f"  {model.name:12} fp32 {ours:9.1f}  ONNX Runtime {theirs:9.1f}  ratio {ours / theirs:.2f}"
            if "int8" in options.precisions and model.integer:
                integer = counter.variant(model, compile_it(model, "int8", target, work)["folder"])
                ratios["int8 / fp32"].append(integer / ours)
                peer = counter.onnxruntime(model.int8(work, "onnxruntime-arm"), built["folder"] / "x.npy", integer)
                ratios["int8 / ONNX Runtime int8"].append(integer / peer)
                line += f"   int8 {integer:9.1f}  {integer / ours:.2f} of fp32, {integer / peer:.2f} of {peer:.1f}"
            print(line, flush=True)
        for name, found in ratios.items():
            if found:
                print(f"  {name}: geometric mean {statistics.geometric_mean(found):.3f}, worst {np.max(found):.3f}")


if __name__ == "__main__":
    main()
