"""The shape of the code: imports go one way, each module keeps to what it knows, functions fit a screen."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = "ascend_runtime"

# From top to bottom: a module imports from the layers below its own, and from its own package.
LAYERS = [
    ("commands", ("ascend_runtime.__main__",)),
    ("arguments of commands", ("ascend_runtime.command_line",)),
    ("headless", ("ascend_runtime.headless",)),
    ("conversion", ("ascend_runtime.conversion",)),
    ("comparison", ("ascend_runtime.comparison",)),
    ("inspection", ("ascend_runtime.inspection",)),
    ("calibration", ("ascend_runtime.calibration",)),
    ("options and progress of commands", ("ascend_runtime.video_options", "ascend_runtime.progress")),
    ("nodes", ("nodes",)),
    ("client", ("ascend_runtime.client",)),
    ("submission", ("ascend_runtime.submission",)),
    ("launcher", ("ascend_runtime.launcher",)),
    ("restarts", ("ascend_runtime.restarts",)),
    ("worker", ("ascend_runtime.worker",)),
    ("job", ("ascend_runtime.job",)),
    ("pipeline", ("ascend_runtime.pipeline",)),
    ("conditioning", ("ascend_runtime.conditioning",)),
    ("components", ("ascend_runtime.components",)),
    ("loras", ("ascend_runtime.loras",)),
    ("sampling, text, video and profiling",
        tuple(f"ascend_runtime.{name}" for name in ("sampling", "text", "video", "profiling"))),
    ("tiling", ("ascend_runtime.tiling",)),
    ("experts", ("ascend_runtime.experts",)),
    ("families", ("ascend_runtime.families",)),
    ("accelerate", ("ascend_runtime.accelerate",)),
    ("parallel", ("ascend_runtime.parallel",)),
    ("checkpoints", ("ascend_runtime.checkpoints",)),
    ("ops", ("ascend_runtime.ops",)),
    ("precision and memory", ("ascend_runtime.precision", "ascend_runtime.memory")),
    ("arguments", ("ascend_runtime.arguments",)),
    ("transport", ("ascend_runtime.transport",)),
    ("protocol", ("ascend_runtime.protocol",)),
    ("devices", ("ascend_runtime.devices",)),
    ("environment", ("ascend_runtime.environment",)),
    ("host and cores", ("ascend_runtime.host", "ascend_runtime.cores")),
    ("presets and reports", ("ascend_runtime.presets", "ascend_runtime.report_words")),
    ("vae_form", ("ascend_runtime.vae_form",)),
    ("specs", ("ascend_runtime.specs", "ascend_runtime.acceleration")),
    ("plans", ("ascend_runtime.plans",)),
    ("description", ("ascend_runtime.description",)),
]
# What only some modules may import, by the first part of the name, or by the whole of it.
RESERVED = {
    "torch_npu": ("ascend_runtime.ops.libraries",),
    "mindiesd": ("ascend_runtime.ops.libraries",),
    "socket": tuple(f"ascend_runtime.{name}" for name in ("transport", "launcher", "worker", "headless")),
    "subprocess": ("ascend_runtime.launcher", "ascend_runtime.headless"),
    "safetensors": ("ascend_runtime.checkpoints",),
    "transformers": ("ascend_runtime.components", "ascend_runtime.families"),
    "torch.distributed": tuple(f"ascend_runtime.{name}" for name in ("ops", "parallel", "job", "pipeline")),
}
COMFYUI = {"comfy", "comfy_api", "comfy_api_nodes", "comfy_extras", "comfy_execution", "execution", "folder_paths",
           "latent_preview", "node_helpers", "nodes", "server"}  # fmt: skip
PICKLE_READERS = ("ascend_runtime.checkpoints.pickles",)  # takes the numbers of its codes, and none of its readers
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
LONGEST_FUNCTION = 60
TABLES = {"define_schema"}  # a node's inputs, one after the other: data, that happens to stand in a function
LONGEST_LINE = 120


def modules():
    """All our modules that ship: dotted name -> file."""
    files = [path for package in (RUNTIME, "nodes") for path in (ROOT / package).rglob("*.py")]
    return {dotted(path): path for path in sorted(files)}


def dotted(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(name, path):
    """(imported module's absolute name, line) of every import in a module, also those inside functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
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


def inside(name, package):
    return name == package or name.startswith(package + ".")


def layer_of(name):
    """Number from the top of the layer that a module of ours is in, or None for what is not ours."""
    found = [number for number, (_, members) in enumerate(LAYERS) if any(inside(name, m) for m in members)]
    assert len(found) < 2, f"{name} is in two layers"
    return found[0] if found else None


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
        same_package = own == other and len(LAYERS[own][1]) == 1
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
    ("ascend_runtime.command_line", "torch"),
    ("ascend_runtime.progress", "torch"),
    ("ascend_runtime.client", "diffusers"),
    ("ascend_runtime.client", "transformers"),
])  # fmt: skip
def test_light_modules_stay_light(module, unwanted):
    """Also through what they import."""
    probe = f"import sys, {module}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, timeout=120, check=False).returncode == 0


@pytest.mark.parametrize("name", modules())
def test_functions_fit_a_screen(name):
    tree = ast.parse(modules()[name].read_text())
    for node in ast.walk(tree):
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
    text = modules()[name].read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{name} has no docstring"


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
    path.write_text("def f():\n    from ..families import wan\n    from .. import ops\nimport torch.nn\n")
    found = dict(imports("ascend_runtime.parallel.sequence", path))
    assert found == {"ascend_runtime.families.wan": 2, "ascend_runtime.ops": 3, "torch.nn": 4}
    assert layer_of("ascend_runtime.families.wan") < layer_of("ascend_runtime.parallel.sequence")
