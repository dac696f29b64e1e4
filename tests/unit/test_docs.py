"""What the documents point at exists, and docs/architecture.md names every room."""

import re
from pathlib import Path

import pytest
from layers import layer_of

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)[^)]*\)|<(?:img|a)\s[^>]*?(?:src|href)=\"([^\"]+)\"")
ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def links(document: Path) -> list[str]:
    """The targets of a document's links and images, in Markdown or HTML."""
    return [first or second for first, second in LINK.findall(CODE.sub("", document.read_text()))]


def anchors(document: Path) -> set[str]:
    """The names under which GitHub lets a document's headings be linked to."""
    headings = HEADING.findall(CODE.sub("", document.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_relative_links_and_images_resolve(document):
    for link in links(document):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{document.name} points at {link}"
        assert not anchor or anchor in anchors(target), f"{document.name} points at {link}"


def test_the_readme_has_links():
    """The test above proves nothing of a document whose links it does not see."""
    found = links(ROOT / "README.md")
    assert "docs/architecture.md" in found and any(link.endswith(".png") for link in found)


def test_the_architecture_names_every_room_from_the_top_down():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [room for room in ROW.findall(text) if room.endswith("/")]
    folders = {path.parent for package in ("ascend_runtime", "nodes") for path in (ROOT / package).rglob("*.py")}
    assert sorted(rooms) == sorted(f"{folder.relative_to(ROOT)}/" for folder in folders - {ROOT / "ascend_runtime"})
    floors = [layer_of(room.rstrip("/").replace("/", ".")) for room in rooms]
    assert floors == sorted(floors), "a row is not in its place"
