"""How functions that only compiled ones call are compiled: no further than to LLVM's code, in few steps.

Numba optimises a function and translates it to machine code so that Python can call it; then LLVM puts it
into its callers and does all that once more. For functions that Python never calls the first time is wasted.
Numba's steps for what is not in our functions (closures, ``raise``, array expressions, branches
that a type decides, loops over tuples) each look through all of a function, too; a function that has any of
it is refused, or, of expressions and branches, compiled as it stands.
"""

from __future__ import annotations

from typing import Any

from numba import _dynfunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.typed_passes import (
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.untyped_passes import FixupArgs, IRProcessing, ReconstructSSA, TranslateByteCode

__all__ = ["InliningCompiler"]


class _Inlined(JITCodeLibrary):
    """LLVM's code of a function, hardly optimised, for its callers to be linked with."""

    def _optimize_functions(self, ll_module: Any) -> None:
        # References to arrays that are counted up and down again are found while a function is small.
        if any(function.name.startswith("NRT_") for function in ll_module.functions):
            super()._optimize_functions(ll_module)
        else:
            ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _InlinedLowering(NativeLowering):
    _name = "nmsolve_inlined_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _Inlined(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        changed: bool = super().run_pass(state)
        made = state.cr
        # Callers look the code up by a function of Python's; this one has nothing to run.
        handle = _dynfunc.make_function(
            made.fndesc.lookup_module(), made.fndesc.qualname, "", 0, made.env, (state.library,)
        )
        state.targetctx.insert_user_function(handle, made.fndesc, [state.library])
        state.cr = made._replace(cfunc=handle)
        return changed


class InliningCompiler(CompilerBase):
    """Numba's compiler for functions that are only called by compiled ones."""

    def define_pipelines(self) -> list[Any]:
        """The one list of steps that there is."""
        steps = PassManager("nmsolve_inlined")
        for step in (
            TranslateByteCode,
            FixupArgs,
            IRProcessing,
            ReconstructSSA,
            NopythonTypeInference,
            PreLowerStripPhis,
            IRLegalization,
            _InlinedLowering,
            NoPythonBackend,
        ):
            steps.add_pass(step, step.name())
        steps.finalize()
        return [steps]
