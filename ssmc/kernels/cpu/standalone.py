"""What compiled kernels call of Numba, for a process that has none of it.

Kernels make arrays for themselves and drop them again; Numba's header of such an array holds a
count of references, a destructor, two words for it, the address of the data and their size
(numba/core/runtime/nrt.h, 0.68). The rest of Numba's runtime is called where a function raises,
which kernels do not: that ends the process.
"""

from __future__ import annotations

import llvmlite.binding as llvm

NAME = "runtime"
HEADER = 64  # bytes in front of the data at least
_NEVER = (
    "numba_attempt_nocopy_reshape",
    "numba_do_raise",
    "numba_gil_ensure",
    "numba_gil_release",
    "numba_runtime_build_excinfo_struct",
    "numba_unpickle",
)
_MEMORY = f"""
declare ptr @malloc(i64)
declare void @free(ptr)
declare void @abort()

define ptr @NRT_MemInfo_alloc_aligned(i64 %size, i32 %alignment) {{
  %align = zext i32 %alignment to i64
  %behind = add i64 %align, {HEADER}
  %total = add i64 %size, %behind
  %info = call ptr @malloc(i64 %total)
  %none = icmp eq ptr %info, null
  br i1 %none, label %full, label %made
full:
  call void @abort()
  unreachable
made:
  %place = ptrtoint ptr %info to i64
  %far = add i64 %place, %behind
  %mask = sub i64 0, %align
  %data = and i64 %far, %mask
  store i64 1, ptr %info
  %dtor = getelementptr i64, ptr %info, i64 1
  store i64 0, ptr %dtor
  %dtor_info = getelementptr i64, ptr %info, i64 2
  store i64 0, ptr %dtor_info
  %data_place = getelementptr i64, ptr %info, i64 3
  store i64 %data, ptr %data_place
  %size_place = getelementptr i64, ptr %info, i64 4
  store i64 %size, ptr %size_place
  ret ptr %info
}}

define void @NRT_MemInfo_call_dtor(ptr %info) {{
  call void @free(ptr %info)
  ret void
}}

define void @NRT_Free(ptr %memory) {{
  call void @free(ptr %memory)
  ret void
}}
"""
_END = """
define void @{name}() {{
  call void @abort()
  unreachable
}}
"""


def runtime() -> bytes:
    """The object file that has these functions."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(reloc="pic")
    text = _MEMORY + "".join(_END.format(name=name) for name in _NEVER)
    module = llvm.parse_assembly(f'target triple = "{machine.triple}"\n{text}')
    module.verify()
    return bytes(machine.emit_object(module))
