"""Writes locales/en/nodeDefs.json from the nodes' own schemas, so that names and tooltips are written once.

    .venv/bin/python scripts/make_locales.py

The other languages are translations of that file, written by hand; tests/test_node_texts.py holds them to its keys.
"""

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ENGLISH = REPOSITORY / "locales" / "en" / "nodeDefs.json"
sys.path.insert(0, str(REPOSITORY / "tests"))
from comfy_server import ComfyServer  # noqa: E402


def node_definitions(object_info):
    """The texts of our nodes, as ComfyUI's page looks them up, from what GET /object_info answers."""
    ours = (name for name in object_info if name.startswith("Ascend"))
    return {name: _texts(object_info[name]) for name in sorted(ours)}


def _texts(node):
    options = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    inputs = {name: {"name": name, "tooltip": more.get("tooltip", "")} for name, (_, more) in options.items()}
    if any(more.get("control_after_generate") for _, more in options.values()):
        inputs["control_after_generate"] = {"name": "control after generate"}  # the widget that the page adds
    outputs = enumerate(zip(node["output_name"], node["output_tooltips"]))
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": inputs,
        "outputs": {str(index): {"name": name, "tooltip": tooltip or ""} for index, (name, tooltip) in outputs},
    }


if __name__ == "__main__":
    with ComfyServer() as server:
        definitions = node_definitions(server.get("/object_info"))
    ENGLISH.write_text(json.dumps(definitions, indent=2, ensure_ascii=False) + "\n")
    print(ENGLISH.relative_to(REPOSITORY))
