"""The layers of the code, and which module is in which."""

# From top to bottom: a module imports from the layers below its own, and from its own package.
LAYERS = [
    ("nodes", ("nodes",)),
    ("commands", ("ascend_runtime.__main__", "ascend_runtime.commands")),
    ("client", ("ascend_runtime.client",)),
    ("engine", ("ascend_runtime.engine",)),
    ("wire", ("ascend_runtime.wire",)),
    ("components", ("ascend_runtime.components",)),
    ("acceleration", ("ascend_runtime.acceleration",)),
    ("planner", ("ascend_runtime.planner",)),
    ("recognition", ("ascend_runtime.recognition",)),
    ("models", ("ascend_runtime.models",)),
    ("parallel", ("ascend_runtime.parallel",)),
    ("checkpoints", ("ascend_runtime.checkpoints",)),
    ("ops", ("ascend_runtime.ops",)),
    ("hardware", ("ascend_runtime.hardware",)),
    ("specs", ("ascend_runtime.specs",)),
    ("errors", ("ascend_runtime.errors",)),
]


def inside(name, package):
    return name == package or name.startswith(package + ".")


def layer_of(name):
    """Number from the top of the layer that a module of ours is in, or None for what is not ours."""
    found = [number for number, (_, members) in enumerate(LAYERS) if any(inside(name, m) for m in members)]
    assert len(found) < 2, f"{name} is in two layers"
    return found[0] if found else None
