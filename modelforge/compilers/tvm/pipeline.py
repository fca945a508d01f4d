"""TVM's own way from kernels to code, with tiles on the stack: LLVM keeps in registers what it can see whole.

TVM 0.27 leaves only "global" buffers below a kilobyte on the stack; for all others it calls an allocator, for each tile
anew. A tile of AVX-512 is larger, and its sums would go through memory that LLVM cannot reason about.

And without what TVM asserts of a kernel's arguments: three quarters of a small model's code. Kernels are called by the
entries only, with tensors that are theirs; those that come from outside, an entry tests itself (``check_tensor_info``).
"""

from __future__ import annotations

from math import prod
from typing import Any, Final

from modelforge.compilers.tvm.api import structural_map, tirx, tvm
from modelforge.compilers.tvm.arm import with_own_instructions

NAME: Final = "modelforge"
_STACK_BYTES: Final = 32 << 10
"""What one buffer may take of a thread's stack (8 MB on Linux; TVM's worker threads have the same)."""
_KEEP: Final = {"disable_lower_builtin": tirx.IntImm("bool", 1)}
"""``kDisableLowerTVMBuiltin`` of TVM's lower_tvm_builtin.cc."""


def compile_module(module: Any, target: Any) -> Any:
    """Compile a module of graphs and scheduled kernels."""
    return tvm.compile(module, target, tir_pipeline=NAME)


def _pipeline() -> Any:
    usual, host, device = tvm.tirx.get_tir_pipeline("default")

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]  # TVM ships no types
    def lowered(module: Any, context: Any) -> Any:
        del context
        module = tvm.tirx.transform.SkipAssert()(usual(module))
        for name, function in list(module.functions_items()):
            if isinstance(function, tirx.PrimFunc):
                body = _on_stack(function.body)
                module[name] = function.with_body(with_own_instructions(body) if _for_arm(function) else body)
        return module

    return lowered, host, device


def _for_arm(function: Any) -> bool:
    return "aarch64" in str(function.attrs["target"])


def _on_stack(body: Any) -> Any:
    return structural_map(body, (tirx.AllocBuffer, _kept), order="post")


def _kept(statement: Any) -> Any:
    buffer = statement.buffer
    if buffer.scope() != "local" or any(not isinstance(size, tirx.IntImm) for size in buffer.shape):
        return statement
    if prod(int(size) for size in buffer.shape) * tvm.DataType(buffer.dtype).itemsize > _STACK_BYTES:
        return statement
    return tirx.AllocBuffer(buffer, annotations=_KEEP)


tvm.tirx.register_tir_pipeline(NAME, _pipeline)
