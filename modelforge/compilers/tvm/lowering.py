"""A module of graphs in, a module of unscheduled kernels out: channels last, weights packed, chains fused."""

from __future__ import annotations

from functools import partial
from typing import Any

from modelforge.compilers.tvm.affine import FoldAffine
from modelforge.compilers.tvm.api import graphs, relax, rewritten, target, tvm
from modelforge.compilers.tvm.chains import LayerNorms
from modelforge.compilers.tvm.coarse import CoarseSigmoids
from modelforge.compilers.tvm.earlier import EarlierQuantize
from modelforge.compilers.tvm.fixed import FixedHardSwish
from modelforge.compilers.tvm.integer import to_integers
from modelforge.compilers.tvm.kernels import rewriter
from modelforge.compilers.tvm.layout import channels_last
from modelforge.compilers.tvm.machine import Machine
from modelforge.compilers.tvm.phases import to_phases
from modelforge.compilers.tvm.shuffle import ForwardShuffles
from modelforge.compilers.tvm.simplify import FoldPlain, LongSums, Pairwise, PlainClip, Reciprocal


def lower(module: Any, machine: Machine) -> Any:
    """Lower to calls of kernels; each that a rule made carries that rule's name (:mod:`.kernels.rule`)."""
    with target(machine):
        for mutator in (FoldPlain, LayerNorms, Reciprocal, FoldAffine, Pairwise, LongSums, PlainClip):
            module = rewritten(module, mutator)
        module = to_phases(module)
        for mutator in (EarlierQuantize, ForwardShuffles):
            module = rewritten(module, mutator)
        module = channels_last(to_integers(module, machine))
        for pass_ in (FixedHardSwish, CoarseSigmoids):
            module = rewritten(module, partial(pass_, machine=machine))
        return to_kernels(module, machine)


def to_kernels(module: Any, machine: Machine) -> Any:
    """The last part of :func:`lower`: operators become kernels, and chains of kernels one."""
    entries = [name.name_hint for name, _ in graphs(module)]
    with target(machine):
        module = rewritten(module, lambda own: rewriter(own, machine))
        passes = [
            relax.transform.CanonicalizeBindings(),
            relax.transform.DeadCodeElimination(entries),
            relax.transform.FoldConstant(),
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(entries),
        ]
        return tvm.transform.Sequential(passes)(module)
