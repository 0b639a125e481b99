"""How the engine's functions are compiled: inner ones into kernels, a kernel with int64 arguments alone, kept on disk.

Numba optimizes and emits machine code for every function that another one calls, and again within each caller.
Inner functions here only lend their LLVM code to the kernels that link them, each of which is optimized once: 3 s
for the first forward, not 9 s.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
from llvmlite.binding import Linkage, parse_assembly
from numba.core import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.types.misc import unliteral


class _LinkedLibrary(JITCodeLibrary):
    """Code to be linked into a kernel; never optimized or emitted by itself."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    @property
    def codegen(self) -> Any:
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """No environment: nothing here raises or calls Python."""


class _KernelLibrary(JITCodeLibrary):
    """A kernel with all that it calls, none of it seen from outside.

    The execution engine resolves names over all kernels of the process, and a name that Numba made in the process that
    wrote a cache entry can mean another function here.
    """

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.linkonce_odr:
                function.linkage = "internal"
                for name, attribute in _INLINED.items():
                    if name in function.name and _takes_attributes():
                        function.add_function_attribute(attribute)
        try:
            passes, builder = self.codegen._module_pass_manager(loop_vectorize=False, slp_vectorize=False, opt=_LEVEL)
        except (AttributeError, TypeError, ValueError):  # another Numba's passes: right as well, and slower
            super()._optimize_final_module()
        else:
            passes.run(self._final_module, builder)


@cache
def _takes_attributes() -> bool:
    """Whether "noinline" goes to the function: llvmlite 0.44 gives it to the result, and LLVM refuses the module."""
    module = parse_assembly("define void @f() { ret void }")
    module.get_function("f").add_function_attribute("noinline")
    try:
        module.verify()
    except RuntimeError:
        return False  # then LLVM chooses, and some kernels take longer to compile
    return True


class _KernelCompiler(Compiler):
    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, *rest: Any) -> None:
        library = _KernelLibrary(targetctx.codegen(), "kernel")
        library.enable_object_caching()
        super().__init__(typingctx, targetctx, library, args, *rest)


class _InnerCompiler(Compiler):
    def __init__(self, typingctx: Any, targetctx: Any, library: Any, args: Any, *rest: Any) -> None:
        library = _LinkedLibrary(targetctx.codegen(), "inner")
        super().__init__(typingctx, targetctx, library, args, *rest)


_LEVEL = 1
"""The loops that matter are vectors already. LLVM's level 3 takes 0.5 to 0.9 s more for a kernel, a tenth of its time,
and its code is no faster: at level 1, 24 calls took 0.98 of the time in the mean (medians, 0.8 to 1.13; AVX2).
"""
_INLINED: dict[str, str] = {}
"""LLVM's word on functions that are not left to its choice, by their names as they stand in mangled ones."""
_OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}


def inner(function: Callable[..., Any]) -> Any:
    """A function that only kernels call: compiled for the types that come, without a Python entry."""
    return numba.njit(**_OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=_InnerCompiler)(
        function
    )


def general(function: Callable[..., Any]) -> Any:
    """An inner function that is compiled once, not for each constant that it is called with: 0.4 s of a forward's 4."""
    dispatcher = inner(function)
    template = dispatcher.get_call_template
    dispatcher.get_call_template = lambda args, kws: template(tuple(map(unliteral, args)), kws)
    return dispatcher


def apart(function: Callable[..., Any]) -> Any:
    """An inner function that stays one: for what is long, called from several places, and not for single elements.

    LLVM would put it into each of its callers.
    """
    _INLINED[f"{len(function.__name__)}{function.__name__}"] = "noinline"
    return general(function)


def within(function: Callable[..., Any]) -> Any:
    """An inner function that LLVM puts into its caller, whatever it thinks of that."""
    _INLINED[f"{len(function.__name__)}{function.__name__}"] = "alwaysinline"
    return inner(function)


def compiled(function: Callable[..., Any], name: str, for_python: bool, holds_gil: bool = False) -> Any:
    """A function of int64 arguments, under a name of its own: Numba's result; Python calls its `entry_point`.

    Without the dispatcher that is 0.2 us a call; the GIL is released, or held for what threads must not do at once.
    """
    function.__name__ = function.__qualname__ = "cugn_" + hashlib.sha256(name.encode()).hexdigest()[:16]
    signature = (types.int64,) * function.__code__.co_argcount
    collecting = gc.isenabled()
    gc.disable()  # nothing of what Numba builds can go before the end: 10 % of the time
    try:
        dispatcher = numba.njit(
            signature,
            **{**_OPTIONS, "nogil": not holds_gil},
            no_cfunc_wrapper=True,
            no_cpython_wrapper=not for_python,  # 30 ms, of 250 for a small part
            pipeline_class=_KernelCompiler,
        )(function)
    finally:
        if collecting:
            gc.enable()
    (result,) = dispatcher.overloads.values()
    return result
