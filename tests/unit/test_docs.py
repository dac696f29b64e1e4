"""The documents: what they point at exists, what they list is all there is, and each thing is said once."""

import ast
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from benchmarks.__main__ import BENCHMARKS
from layers import layer_of

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCUMENTS, ROOT / "assets" / "tiny_wan" / "README.md", *sorted((ROOT / "web" / "docs").glob("*/*.md"))]
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)[^)]*\)|<(?:img|a)\s[^>]*?(?:src|href)=\"([^\"]+)\"")
TARGET = re.compile(r"\]\([^)]+\)")
ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`[^`\n]+`")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
MOST_LINES = 130  # of the README: one and a half screens
LEAST_WORDS, LEAST_CHARACTERS = 6, 12  # of a sentence that may stand only once, in English and in Chinese
WORDS = r"\b(told|tells|alone|beside|anew|foreseen|foretells?|hangs? (?:\w+ )?on|shall)\b"  # of a translation
NOT_ENGLISH = re.compile(WORDS, re.IGNORECASE)


def links(document: Path) -> list[str]:
    """The targets of a document's links and images, in Markdown or HTML."""
    return [first or second for first, second in LINK.findall(CODE.sub("", document.read_text()))]


def anchors(document: Path) -> set[str]:
    """The names under which GitHub lets a document's headings be linked to."""
    headings = HEADING.findall(CODE.sub("", document.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sentences(text: str) -> list[str]:
    """The sentences and table cells of a Markdown text that are long enough to be noticed twice, as bare words."""
    text = HEADING.sub("\n", TARGET.sub("]", CODE.sub("\n", text)))
    text = re.sub(r"^\s*(?:[-*>]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)  # each item is a paragraph
    text = re.sub(r"^\|.*$", lambda row: "\n\n" + row[0].replace("|", "\n\n") + "\n\n", text, flags=re.MULTILINE)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?:;])\s|(?<=[。！？；：])", " ".join(paragraph.split())):
            words = re.findall(r"[\u4e00-\u9fff]|[\w']+", sentence.lower())
            chinese = sum("\u4e00" <= word <= "\u9fff" for word in words)
            if len(words) - chinese >= LEAST_WORDS or chinese >= LEAST_CHARACTERS:
                found.append(" ".join(words))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_relative_links_and_images_resolve(document):
    for link in links(document):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{document.name} points at {link}"
        assert not anchor or anchor in anchors(target), f"{document.name} points at {link}"


def test_the_readme_is_short_and_shows_a_picture():
    assert len(README.read_text().splitlines()) <= MOST_LINES
    assert any(link.endswith(".png") for link in links(README))


def test_every_document_is_one_link_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(README)}
    assert [str(document) for document in DOCUMENTS[1:] if document not in linked] == []


def test_the_readme_names_every_node_and_every_workflow():
    text = README.read_text()
    nodes = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text())
    workflows = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    names = {node["display_name"] for node in nodes.values()} | {f"`{name}`" for name in workflows}
    assert len(names) == len(nodes) + len(workflows) > 20
    assert {name for name in names if name not in text} == set()


def test_sentences_are_seen():
    text = "# One two three four five six\n\nIt is **one** of two, or\nof three. It is.\n\n"
    text += "- A `b` c [d e](x.md) f.\n\n| Yes | no |"
    assert sentences(text) == ["it is one of two or of three", "a b c d e f"]
    assert sentences("每张卡都存放完整的权重，除非分摊。好的。") == ["每 张 卡 都 存 放 完 整 的 权 重 除 非 分 摊"]
    assert sentences("| a b c d e f | g |\n|---|---|\n```\na b c d e f g\n```") == ["a b c d e f"]


def test_no_sentence_stands_twice():
    """What a translation has in no Chinese are commands and messages, as in the original."""
    places = defaultdict(list)
    for document in DOCUMENTS:
        for sentence in sentences(document.read_text()):
            if ".zh" not in document.suffixes or re.search("[\u4e00-\u9fff]", sentence):
                places[sentence].append(document.name)
    assert len(places) > 500
    assert {sentence: names for sentence, names in places.items() if len(names) > 1} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_plain_words(page):
    """Code may have other words: names of variables and functions."""
    text = SPAN.sub("", CODE.sub("", page.read_text()))
    assert [found[0] for found in NOT_ENGLISH.finditer(text)] == []


@pytest.mark.parametrize("folder", ["ascend_runtime", "nodes", "scripts", "benchmarks", "locales"])
def test_plain_words_in_code(folder):
    """In docstrings, comments, texts and names."""
    files = [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".sh", ".json", ".js")]
    lines = [(path, line) for path in files for line in path.read_text().replace("_", " ").splitlines()]
    assert [(path.name, line) for path, line in lines if NOT_ENGLISH.search(line)] == []


def test_every_package_is_explained():
    text = (ROOT / "docs" / "dependencies.md").read_text()
    explained = " ".join(row.split("|")[1] for row in text.splitlines() if row.startswith("| "))
    for file in ROOT.glob("requirements*.txt"):
        lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
        names = {re.split(r"[^\w-]", line)[0] for line in lines if line and not line.startswith("-")}
        assert names and {name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", explained)} == set()


def test_every_flag_of_the_tests_is_explained():
    tree = ast.parse((ROOT / "tests" / "conftest.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    flags = {call.args[0].value for call in calls if call.func.attr == "addoption"}
    rows = set(ROW.findall((ROOT / "docs" / "checks.md").read_text()))
    assert flags and flags == {row for row in rows if re.fullmatch(r"--[\w-]+", row)}


def test_the_benchmarks_that_are_named_exist():
    named = set()
    for document in DOCUMENTS:
        for names in re.findall(r"python -m benchmarks((?: [a-z]+)+)", document.read_text()):
            named |= set(names.split())
    assert {"ascend", "load"} <= named <= set(BENCHMARKS)


def test_the_architecture_names_every_room_from_the_top_down():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [room for room in ROW.findall(text) if room.endswith("/")]
    folders = {path.parent for package in ("ascend_runtime", "nodes") for path in (ROOT / package).rglob("*.py")}
    assert sorted(rooms) == sorted(f"{folder.relative_to(ROOT)}/" for folder in folders - {ROOT / "ascend_runtime"})
    floors = [layer_of(room.rstrip("/").replace("/", ".")) for room in rooms]
    assert floors == sorted(floors), "a row is not in its place"


def test_the_errors_that_help_pages_quote_exist():
    """A quoted error, such as *"... NaN or infinite values"*, has words between the values that the code fills in."""
    texts = []
    for package in ("ascend_runtime", "nodes"):
        for path in (ROOT / package).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            texts += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    quoted = {quote for page in PAGES for quote in re.findall(r'\*"([^"]+)"\*', page.read_text())}
    words = {part.strip() for quote in quoted for part in quote.split("...") if part.strip(" ,")}
    assert words and {word for word in words if not any(word in text for text in texts)} == set()
