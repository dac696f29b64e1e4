"""Stub CANN libraries: just enough for the real torch_npu and mindiesd wheels to be imported where no CANN is.

The wheels' own undefined symbols say what is needed. cann.c answers sensibly where an answer matters (devices, memory,
streams); every other function exists and does nothing, but operators and collectives fail: nothing here computes.
Tensors go to a fake device and come back, except on Ascend950, where torch_npu copies by an operator.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cann.c")
# The libraries that torch_npu is linked with or opens by name, and whose absence it does not take.
LIBRARIES = (
    "libhccl", "libascendcl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel", "libopapi",
    "libnnopbase",
)  # fmt: skip
# CANN's plain C functions; aclnn* are its operators, which are looked up one by one when called.
FUNCTION = re.compile(r"(acl(?!nn)|Msprof|Hccl|rt[A-Z])\w+")
COMPUTES = re.compile(r"aclop(CompileAnd)?Execute|Hccl(All|Broadcast|Reduce|Scatter|Gather|Send|Recv|BatchSend)")
# Functions by whose presence torch_npu knows a newer CANN, and that would need more than to do nothing.
LEFT_OUT = {"aclrtMemcpyBatch", "aclrtMemcpyBatchAsync"}


def packages():
    """The folders of torch_npu and mindiesd in this environment; neither is imported."""
    return tuple(Path(next(iter(importlib.util.find_spec(name).submodule_search_locations)))
                 for name in ("torch_npu", "mindiesd"))  # fmt: skip


def build():
    """The folder with stub libraries for the installed wheels, inside this environment; compiled once."""
    torch_npu, mindiesd = packages()
    binaries = [*torch_npu.glob("_C*.so"), *mindiesd.glob("plugin/torch*/*.so"),
                *(torch_npu / "lib" / name for name in ("libtorch_npu.so", "libtensorpipe.so"))]  # fmt: skip
    seen = [SOURCE.read_text(), Path(__file__).read_text(), *(f"{b} {b.stat().st_mtime_ns}" for b in binaries)]
    folder = Path(sys.prefix) / "stub-cann" / hashlib.sha256("\n".join(seen).encode()).hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
            made = Path(parent) / "cann"
            for part in ("runtime", "compiler", "opp"):  # torch_npu looks whether a CANN has them
                (made / part).mkdir(parents=True)
            _compile(binaries, torch_npu / "include" / "third_party" / "acl" / "inc", made)
            for name in LIBRARIES:  # links, so that all of them are one library with one state
                (made / f"{name}.so").symlink_to("libcann.so")
            if not folder.exists():  # else another process was faster
                made.rename(folder)
    return folder


def variables(folder, devices=1, soc="Ascend910B4"):
    """The environment variables of a process in which `folder`, from `build`, is the CANN."""
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])),
        "ASCEND_HOME_PATH": str(folder),
        "ASCEND_OPP_PATH": str(folder / "opp"),
        "STUB_DEVICES": str(devices),
        "STUB_SOC": soc,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",  # as on a real host
        "MINDIE_LOG_TO_FILE": "0",  # else mindiesd writes to ~/mindie
        "MINDIE_LOG_LEVEL": "error",
        "ASCEND_GLOBAL_LOG_LEVEL": "4",
        "ASCEND_LAUNCH_BLOCKING": "1",  # an operator that fails raises where it was called
    }


def _compile(binaries, headers, folder):
    """libcann.so in `folder`: cann.c, and a function that does nothing for all else that `binaries` need."""
    written, others = folder / "cann.o", folder / "others.c"
    _run("gcc", "-c", "-fPIC", "-Wall", "-Werror", "-I", headers, "-o", written, SOURCE)
    defined = {line.split()[-1] for line in _run("nm", "--defined-only", "--extern-only", written).splitlines()}
    needed = set().union(*(_names(binary) for binary in binaries)) - LEFT_OUT - defined
    lines = (f"long {name}(void) {{ return {207000 if COMPUTES.match(name) else 0}; }}\n" for name in sorted(needed))
    others.write_text("".join(lines))  # 207000 is ACL_ERROR_RT_FEATURE_NOT_SUPPORT
    _run("gcc", "-shared", "-fPIC", "-o", folder / "libcann.so", written, others)


def _names(binary):
    """The CANN functions that a library is linked with, or looks up by name when it is first called."""
    undefined = {line.split()[-1] for line in _run("nm", "-D", "--undefined-only", binary).splitlines()}
    by_name = {word.decode() for word in re.findall(rb"(?<=\0)\w{4,64}(?=\0)", binary.read_bytes())}
    return {name for name in undefined | by_name if FUNCTION.fullmatch(name)}


def _run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout
