"""A graph of a few operators, compiled for a machine and run on this one: how tests of kernels see their rules."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modelforge.compilers.tvm import lowering, pipeline, scheduling
from modelforge.compilers.tvm.api import relax, target, tvm
from modelforge.compilers.tvm.machine import Machine
from modelforge.compilers.tvm.scheduling import KernelReport
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, runs_here

Array = np.ndarray
Graph = Callable[..., Any]
"""Emits operators: ``graph(emit, *inputs)`` returns the result, where ``emit(call)`` gives the value of a call."""


def here() -> Machine:
    """A machine whose code runs on this one."""
    plain = Machine(
        f"{platform.machine()}-linux-gnu", "x86-64" if platform.machine() == "x86_64" else "generic", (), 2, 128
    )
    return next((machine for machine in (AVX512, AVX2) if runs_here(machine)), plain)


def compiled(graph: Graph, inputs: Sequence[Array], machine: Machine) -> tuple[Any, list[KernelReport]]:
    """The executable, and what became of the kernels."""
    module, reports = scheduled(graph, inputs, machine)
    return pipeline.compile_module(module, target(machine)), reports


def scheduled(graph: Graph, inputs: Sequence[Array], machine: Machine) -> tuple[Any, list[KernelReport]]:
    """The scheduled kernels, and what became of them."""
    return scheduling.schedule_all(lowering.lower(_module(graph, inputs), machine), machine)


def run(graph: Graph, inputs: Sequence[Array], machine: Machine | None = None) -> tuple[Array, list[KernelReport]]:
    """The result of the graph on this machine."""
    executable, reports = compiled(graph, inputs, machine or here())
    result = relax.VirtualMachine(executable, tvm.cpu())["main"](*[tvm.runtime.tensor(array) for array in inputs])
    return result.numpy(), reports


def rules(reports: Sequence[KernelReport]) -> dict[str, str]:
    """The rule of each kernel. A rule that raised has told why: that is a failure of the test."""
    refused = [report for report in reports if report.rule == "none" or "rror" in report.note or ": " in report.note]
    assert not refused, refused
    return {report.name: report.rule for report in reports}


def _module(graph: Graph, inputs: Sequence[Array]) -> Any:
    builder = relax.BlockBuilder()
    variables = [
        relax.Var(f"input{at}", relax.TensorType(array.shape, str(array.dtype))) for at, array in enumerate(inputs)
    ]
    with builder.function("main", variables):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(graph(builder.emit, *variables)))
        builder.emit_func_output(result)
    return builder.get()
