"""Copies the nodes' names and tooltips to where ComfyUI's page reads them, so that each language is written once.

    .venv/bin/python scripts/make_node_texts.py

English is written in the schemas (nodes/): it goes to locales/en/nodeDefs.json. Other languages are translated by
hand in locales/*/nodeDefs.json. Both go into the lists of inputs and outputs of the help pages in web/docs.
"""

import json
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LOCALES = REPOSITORY / "locales"
DOCS = REPOSITORY / "web" / "docs"
WORDS = {
    "en": {"inputs": "Inputs", "outputs": "Outputs", "colon": ": ", "optional": " Optional.", "default": " Default: ",
           "auto": "auto", "off": "off"},
    "zh": {"inputs": "输入", "outputs": "输出", "colon": "：", "optional": "可选。", "default": "默认值：",
           "auto": "自动", "off": "关闭"},
}  # fmt: skip
sys.path.insert(0, str(REPOSITORY))
from scripts.lib.comfy_server import ComfyServer  # noqa: E402


def main():
    with ComfyServer() as server:
        nodes = {name: node for name, node in server.get("/object_info").items() if name.startswith("Ascend")}
    english = LOCALES / "en" / "nodeDefs.json"
    english.write_text(json.dumps(node_definitions(nodes), indent=2, ensure_ascii=False) + "\n")
    for language in WORDS:
        texts = json.loads((LOCALES / language / "nodeDefs.json").read_text())
        for name, node in nodes.items():
            page = DOCS / name / f"{language}.md"
            page.write_text(with_lists(page.read_text(), node, texts[name], language))


def node_definitions(nodes):
    """The English texts of nodes in the form of nodeDefs.json, from the answer of GET /object_info."""
    return {name: _texts(node) for name, node in sorted(nodes.items())}


def with_lists(page, node, texts, language):
    """A help page (Markdown) with lists of inputs and outputs from the schema and the language's texts. Lists, as
    ComfyUI's side bar is too narrow for tables."""
    words = WORDS[language]
    for part, rows in (("inputs", _input_rows(node, texts, language)), ("outputs", _output_rows(node, texts))):
        lines = (f"- {label}{words['colon']}{what}" for label, what in rows)
        entries = "".join(breakable(line).replace("\n", "<br>") + "\n" for line in lines)
        begin = rf"(?<=^## {words[part]}\n\n)((?:\||- ).*\n)+"
        page, count = re.subn(begin, lambda _: entries, page, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{node['name']}, {language}: the help page has no list under '## {words[part]}'")
    return page


def _input_rows(node, texts, language):
    words = WORDS[language]
    for group in ("required", "optional"):
        for name, (_, options) in node["input"].get(group, {}).items():
            what = texts["inputs"][name]["tooltip"]
            if group == "optional":
                what += words["optional"]
            if options.get("default", "") != "":
                shown = options.get("shown_as", {})
                default = words[shown["word"]] if shown.get("value") == options["default"] else options["default"]
                what += f"{words['default']}`{default}`"
            yield _label(name, texts["inputs"][name]["name"]), what


def _output_rows(node, texts):
    for index, name in enumerate(node["output_name"]):
        output = texts["outputs"][str(index)]
        yield _label(name, output["name"]), output["tooltip"]


def breakable(text):
    """The text with places where the page may break its long words, such as names of files, also in code."""
    text = re.sub(r"`([\w./-]{23,})`", r"<code>\1</code>", text, flags=re.ASCII)
    return re.sub(r"[\w./-]{23,}", lambda word: re.sub(r"(?<=[_./])(?=\w)", "<wbr>", word[0]), text, flags=re.ASCII)


def _label(name, shown):
    return f"**{name}**" if name == shown else f"**{shown}** `{name}`"


def _texts(node):
    options = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    inputs = {
        name: {"name": more.get("display_name", name), "tooltip": more.get("tooltip", "")}
        for name, (_, more) in options.items()
    }
    if any(more.get("control_after_generate") for _, more in options.values()):
        inputs["control_after_generate"] = {"name": "control after generate"}  # a widget that the page adds
    outputs = enumerate(zip(node["output_name"], node["output_tooltips"]))
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": inputs,
        "outputs": {str(index): {"name": name, "tooltip": tooltip or ""} for index, (name, tooltip) in outputs},
    }


if __name__ == "__main__":
    main()
