"""The shape of the code: imports go one way, each module keeps to what it knows, functions fit a screen."""

import ast
import re
import subprocess
import sys
import textwrap
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
from layers import LAYERS, inside, layer_of

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = "ascend_runtime"

MOST_LAYERS, MOST_AT_THE_TOP, MOST_FILES = 16, 3, 14
# What only some modules may import, by the first part of the name, or by the whole of it.
RESERVED = {
    "torch_npu": ("ascend_runtime.ops.libraries",),
    "mindiesd": ("ascend_runtime.ops.libraries",),
    "socket": tuple(f"ascend_runtime.{name}" for name in (
        "wire", "client.group", "client.machines", "engine.worker", "engine.machine",
        "hardware.interfaces", "commands.queue", "commands.doctor")),
    "subprocess": tuple(f"ascend_runtime.{name}" for name in (
        "client.group", "commands.queue", "commands.doctor", "wire.tls", "engine.machine.entering")),
    "ssl": ("ascend_runtime.wire", "ascend_runtime.commands.queue"),
    "safetensors": ("ascend_runtime.checkpoints",),
    "transformers": ("ascend_runtime.components", "ascend_runtime.models"),
    "torch.distributed": tuple(f"ascend_runtime.{name}" for name in ("ops", "parallel", "engine")),
}
COMFYUI = {"comfy", "comfy_api", "comfy_api_nodes", "comfy_extras", "comfy_execution", "execution", "folder_paths",
           "latent_preview", "node_helpers", "nodes", "server"}  # fmt: skip
# Takes the numbers of its codes, and none of its readers.
PICKLE_READERS = ("ascend_runtime.checkpoints.formats.pickles",)
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
LONGEST_FUNCTION = 60
TABLES = {"define_schema"}  # a node's inputs, one after the other: data, that happens to stand in a function
LONGEST_LINE = 120


@cache
def modules():
    """All our modules that ship: dotted name -> file."""
    files = [path for package in (RUNTIME, "nodes") for path in (ROOT / package).rglob("*.py")]
    return {dotted(path): path for path in sorted(files)}


def dotted(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@cache
def tree_of(path):
    return ast.parse(path.read_text())


def imports(name, path):
    """(imported module's absolute name, line) of every import in a module, also those inside functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - (node.level - 1)] if node.level else []
            base = ".".join([*parts, node.module] if node.module else parts)
            for alias in node.names:  # `from . import devices` imports a module, `from .specs import X` a name of one
                whole = f"{base}.{alias.name}"
                yield (whole if is_module(whole) else base), node.lineno


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("name", modules())
def test_imports_go_down(name):
    if name == RUNTIME:
        return  # resolves its names on first use; holds no import of its own modules
    own = layer_of(name)
    assert own is not None, f"{name} is in no layer of this test; give it one"
    for imported, line in imports(name, modules()[name]):
        other = layer_of(imported)
        if other is None or imported.split(".")[0] == name.split(".")[0] == "nodes":
            continue
        same_package = own == other
        assert other > own or same_package, (
            f"{name}:{line} imports {imported}: from {LAYERS[own][0]!r} up to {LAYERS[other][0]!r}"
        )


@pytest.mark.parametrize("name", modules())
def test_reserved_imports(name):
    for imported, line in imports(name, modules()[name]):
        for reserved, owners in RESERVED.items():
            allowed = not inside(imported, reserved) or any(inside(name, owner) for owner in owners)
            assert allowed, f"{name}:{line} imports {imported}; only {owners} may"
        careful = imported == "pickle" and name in PICKLE_READERS
        assert careful or imported.split(".")[0] not in PICKLES, f"{name}:{line} imports {imported}"


@pytest.mark.parametrize("name", [name for name in modules() if inside(name, RUNTIME)])
def test_the_runtime_knows_nothing_of_comfyui(name):
    for imported, line in imports(name, modules()[name]):
        assert imported.split(".")[0] not in COMFYUI, f"{name}:{line} imports {imported}"


def test_only_the_bridge_knows_the_client():
    users = [name for name, path in modules().items() if inside(name, "nodes")
             and any(inside(i, "ascend_runtime.client") or i == RUNTIME for i, _ in imports(name, path))]  # fmt: skip
    assert users == ["nodes.comfy_bridge"]


def test_layers_name_modules_that_exist():
    for _, members in LAYERS:
        for member in members:
            assert is_module(member) or (ROOT / member.replace(".", "/")).is_dir(), f"{member} is gone"


@pytest.mark.parametrize("module, unwanted", [
    ("ascend_runtime", "torch"),
    ("ascend_runtime.specs", "torch"),
    ("ascend_runtime.models.family", "torch"),
    ("ascend_runtime.models.registry", "torch"),
    ("ascend_runtime.models.wan.family", "torch"),
    ("ascend_runtime.models.wan.family", "diffusers"),
    ("ascend_runtime.commands.command_line", "torch"),
    ("ascend_runtime.commands.progress", "torch"),
    *((f"ascend_runtime.commands.doctor.{part}", package)
      for part, package in (("command", "torch"), ("command", "msgspec"), ("command", "psutil"), ("command", "tqdm"))),
    *((f"ascend_runtime.wire.{part}", "torch") for part in ("packets", "memory", "tls", "link", "control")),
    ("ascend_runtime.engine.machine.entering", "torch"),
    ("ascend_runtime.engine.machine.relay.relay", "torch"),
    ("ascend_runtime.client.runtime", "diffusers"),
    ("ascend_runtime.client.runtime", "transformers"),
])  # fmt: skip
def test_light_modules_stay_light(module, unwanted):
    """Also through what they import."""
    probe = f"import sys, {module}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, timeout=120, check=False).returncode == 0


@pytest.mark.parametrize("name", modules())
def test_functions_fit_a_screen(name):
    for node in ast.walk(tree_of(modules()[name])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in TABLES:
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{name}.{node.name} has {lines} lines"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"{name}:{node.lineno} is a bare except"


@pytest.mark.parametrize("name", modules())
def test_no_syntax_that_python_3_10_lacks(name):
    """x[:, *place] is of Python 3.11, and ast.parse(feature_version=(3, 10)) takes it."""
    for node in ast.walk(ast.parse(modules()[name].read_text(), feature_version=(3, 10))):
        cut = node.slice if isinstance(node, ast.Subscript) else None
        if isinstance(cut, ast.Tuple) and any(isinstance(one, ast.Starred) for one in cut.elts):
            in_parentheses = (cut.lineno, cut.col_offset) < (cut.elts[0].lineno, cut.elts[0].col_offset)
            assert in_parentheses, f"{name}:{node.lineno} has a star in a subscript"


@pytest.mark.parametrize("name", modules())
def test_modules_say_what_they_are(name):
    tree = tree_of(modules()[name])
    assert not tree.body or ast.get_docstring(tree), f"{name} has no docstring"


@pytest.mark.parametrize("folder", [RUNTIME, "nodes", "tests", "scripts", "benchmarks"])
def test_lines_are_at_most_120_wide(folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")]
    assert files
    wide = [
        f"{file.relative_to(ROOT)}:{number} has {len(line)} columns"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > LONGEST_LINE
    ]
    assert not wide, "\n".join(wide)


def test_this_test_sees_an_arrow_that_runs_up(tmp_path):
    path = tmp_path / "sequence.py"
    path.write_text("def f():\n    from ..models import wan\n    from .. import ops\nimport torch.nn\n")
    found = dict(imports("ascend_runtime.parallel.sequence", path))
    assert found == {"ascend_runtime.models.wan": 2, "ascend_runtime.ops": 3, "torch.nn": 4}
    assert layer_of("ascend_runtime.models.wan") < layer_of("ascend_runtime.parallel.sequence")


MAKE_GROUPS = re.compile("new_(sub)?group|split_group|init_device_mesh|_flatten$")


@pytest.mark.parametrize("name", modules())
def test_groups_of_ranks_are_made_in_one_place(name):
    nodes = ast.walk(tree_of(modules()[name]))
    used = {getattr(node, "attr", getattr(node, "id", getattr(node, "name", None))) for node in nodes}
    made = [word for word in used if isinstance(word, str) and MAKE_GROUPS.match(word)]
    assert bool(made) == (name == f"{RUNTIME}.parallel.mesh"), made


def test_the_house_has_few_rooms_and_none_is_crowded():
    assert len(LAYERS) <= MOST_LAYERS
    at_the_top = {path.stem for path in (ROOT / RUNTIME).glob("*.py")} - {"__init__", "__main__"}
    assert len(at_the_top) <= MOST_AT_THE_TOP, at_the_top
    folders = {path.parent for path in modules().values()}
    crowded = {str(folder): count for folder in folders if (count := len(list(folder.glob("*.py")))) > MOST_FILES}
    assert not crowded


# Names that belong behind the door of a family, as a word of an identifier or a key.
OF_A_FAMILY = re.compile(r"(?:^|_)(wan(?:\d+)?|umt5|hunyuan(?:_?video)?|ti2v|flf2v|i2v|t2v|vace)(?:_|$)", re.IGNORECASE)
HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
OUTSIDE = [name for name in modules() if not inside(name, "ascend_runtime.models")]


def names_of_families(tree):
    """(line, name) of identifiers, keys, and values that are compared, which have the name of a family; and comparisons
    of a number of channels with a number."""
    for node in ast.walk(tree):
        words = []
        if isinstance(node, ast.Name):
            words = [node.id]
        elif isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, (ast.arg, ast.keyword)):
            words = [node.arg or ""]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            words = [node.name]
        elif isinstance(node, ast.alias):
            words = [*node.name.split("."), node.asname or ""]
        elif isinstance(node, ast.ImportFrom):
            words = (node.module or "").split(".")
        elif isinstance(node, ast.Dict):
            words = _strings(node.keys)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            words = _strings(sides)
            numbers = [side.value for side in sides if isinstance(side, ast.Constant) and type(side.value) is int]
            if max(numbers, default=0) > 4 and any("channels" in ast.unparse(side) for side in sides):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = [node.value] if OF_A_FAMILY.fullmatch(node.value) else []
        for word in words:
            if OF_A_FAMILY.search(word) or OF_A_FAMILY.search(HUMP.sub("_", word)):
                yield node.lineno, word


def _strings(nodes):
    flat = [one for node in nodes for one in (getattr(node, "elts", None) or [node])]
    return [one.value for one in flat if isinstance(one, ast.Constant) and isinstance(one.value, str)]


@pytest.mark.parametrize("name", OUTSIDE)
def test_families_are_known_behind_their_door_only(name):
    found = list(names_of_families(tree_of(modules()[name])))
    assert not found, f"{name} names a family: {found}"


def test_this_test_sees_a_family():
    code = """
        from ..models.wan import defaults
        import ascend_runtime.models.wan
        TI2V_CHANNELS = 48
        def empty_wan22_latent(): pass
        if form.channels == 48: pass
        if schedule == "wan": pass
        table = {"wan": 1}
        x.umt5 = WanTransformer
        wanted, swan, channels_wanted = table["wan"], 48, channels == wanted
    """
    found = [line for line, _ in names_of_families(ast.parse(textwrap.dedent(code)))]
    assert {2, 3, 4, 5, 6, 7, 8, 9} <= set(found) and found.count(10) == 1


# What several modules have by design: the same question, asked of each.
SAME_IN_SEVERAL = {
    "logger", "main", "run", "files", "load", "networks",
    # Called with the name of their module, as in memory.predicted.
    "choose", "passes_of", "predicted", "published", "read", "sent",
}  # fmt: skip


def test_a_name_means_one_thing():
    homes = defaultdict(list)
    for name, path in modules().items():
        for node in tree_of(path).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            for defined in (getattr(target, "id", getattr(target, "name", "_")) for target in targets):
                if isinstance(defined, str) and not defined.startswith("_") and inside(name, RUNTIME):
                    homes[defined].append(name)
    twice = {name: where for name, where in homes.items() if clash(where) and name not in SAME_IN_SEVERAL}
    assert len(homes) > 500 and not twice


def clash(modules):
    """Whether a name that all these define has two meanings for one reader. Two families may have the same names, as
    neither knows of the other."""
    families = {family_room(module) for module in modules}
    return len(modules) > len(families) or len(modules) > 1 and None in families


def family_room(module):
    """The family whose folder a module is in; None for what families share, and for all else."""
    _, *room = module.split(".")
    return room[1] if room[:1] == ["models"] and len(room) > 2 and room[1] != "shared" else None


def test_this_test_sees_two_meanings_of_a_name():
    wan, hunyuan, shared, ops = (f"{RUNTIME}.{room}" for room in (
        "models.wan.files.names", "models.hunyuan_video.cost", "models.shared.text", "ops.plain"))  # fmt: skip
    assert clash([wan, ops]) and clash([wan, hunyuan, shared]) and clash([wan, f"{RUNTIME}.models.wan.cost"])
    assert clash([ops, f"{RUNTIME}.models.family"]) and not clash([wan, hunyuan]) and not clash([ops])
