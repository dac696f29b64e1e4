"""What the documents point at exists, and docs/architecture.md tells of every file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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


def test_the_architecture_names_every_file_and_no_other():
    rows = set(ROW.findall((ROOT / "docs" / "architecture.md").read_text()))
    missing = {row for row in rows if not (ROOT / row).exists()}
    assert not missing, f"named, but not there: {sorted(missing)}"
    folders = tuple(row for row in rows if row.endswith("/"))
    code = [path for package in ("ascend_runtime", "nodes") for path in (ROOT / package).rglob("*.py")]
    files = {str(path.relative_to(ROOT)) for path in code}
    untold = {file for file in files - rows if not file.startswith(folders) and not file.endswith("__init__.py")}
    assert not untold, f"there, but not named: {sorted(untold)}"
