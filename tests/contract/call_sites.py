"""Calls of the package into torch_npu and mindiesd, and its exchanges between ranks: found in its syntax trees; calls
are also noted when they are made."""

import ast
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "ascend_runtime"


@dataclass(frozen=True)
class Site:
    """A call in our source: the file's name below the package, its lines, and what is called."""

    file: str
    first_line: int
    last_line: int
    called: str  # such as "torch_npu.npu_rms_norm"

    def __str__(self):
        return f"{self.file}:{self.first_line} {self.called}"


@lru_cache(maxsize=None)
def call_sites():
    """All calls of an attribute of `torch_npu()`, `mindiesd()` or `torch.npu` (also as `getattr(torch, kind)`), or of
    a variable that holds one."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))]
        for scope in scopes:
            held = _held(scope)
            for node in ast.walk(scope):
                if isinstance(node, ast.Call) and (called := _dotted(node.func, held)) and "." in called:
                    found.add(Site(str(path.relative_to(PACKAGE)), node.lineno, node.end_lineno, called))
    return found


# What of torch.distributed moves no tensors between ranks.
LOCAL = {
    "FileStore", "P2POp", "PrefixStore", "ProcessGroup", "ReduceOp", "Store", "Work", "barrier",
    "destroy_process_group", "get_backend", "get_global_rank", "get_group_rank", "get_process_group_ranks", "get_rank",
    "get_world_size", "group", "init_process_group", "is_initialized", "new_group", "rendezvous",
}  # fmt: skip


def exchanges():
    """All uses of a function of torch.distributed that may move tensors, and of FSDP2, by the name of the function."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = _exchange(node)
            if name and name not in LOCAL:
                found.add(Site(str(path.relative_to(PACKAGE)), node.lineno, node.end_lineno, name))
    return found


def _exchange(node):
    """The function's name, of `dist.NAME`, `getattr(dist, "NAME", ...)` and `fully_shard`."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("dist", "torch.distributed"):
        return node.attr
    if isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(dist, "):
        return node.args[1].value
    return node.id if isinstance(node, ast.Name) and node.id == "fully_shard" else None


def _held(scope):
    """Variables of a scope that hold a library or a part of one: name -> dotted name."""
    held = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value.body if isinstance(node.value, ast.IfExp) else node.value
            if dotted := _dotted(value, held):
                held[node.targets[0].id] = dotted
    return held


def _dotted(node, held):
    """The dotted name, from its library on, of what an expression is; None where it is of none."""
    source = ast.unparse(node)
    if source in ("torch_npu()", "mindiesd()"):
        return source.removesuffix("()")
    of_torch = isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(torch, ")
    of_torch = of_torch and isinstance(node.func, ast.Name)
    if source == "torch.npu" or of_torch:
        return "npu"
    if isinstance(node, ast.Name):
        return held.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value, held)):
        return f"{owner}.{node.attr}"
    return None


class Recorded:
    """Stands before a library or a part of it: notes each call with its place, and hands it to `answer`.

    answer: (dotted name, function, arguments, keywords) -> what the call returns.
    """

    def __init__(self, real, name, noted, answer):
        self.__dict__.update(_real=real, _name=name, _noted=noted, _answer=answer)

    def __getattr__(self, name):
        value = getattr(self._real, name)
        plain = not callable(value) and type(value).__name__ != "module" and not hasattr(value, "__dict__")
        return value if plain else Recorded(value, f"{self._name}.{name}", self._noted, self._answer)

    def __setattr__(self, name, value):
        setattr(self._real, name, value)

    def __call__(self, *arguments, **keywords):
        frame = sys._getframe(1)
        self._noted.add((frame.f_code.co_filename, frame.f_lineno, self._name))
        return self._answer(self._name, self._real, arguments, keywords)


def made(noted):
    """(the call sites among what `Recorded` noted, what it noted in our source that is no known call site)."""
    sites, places = call_sites(), {}
    for file, line, called in noted:
        if Path(file).is_relative_to(PACKAGE):
            name = str(Path(file).relative_to(PACKAGE))
            places[name, line, called] = {
                site for site in sites
                if (site.file, site.called) == (name, called) and site.first_line <= line <= site.last_line
            }  # fmt: skip
    unknown = {place for place, known in places.items() if not known}
    return set().union(*places.values()), unknown
