"""Every code that the product has in its errors is listed and explained, and every one that is explained is raised."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from ascend_runtime.errors import CODES, code_of, coded, coded_error, with_page

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {name: (ROOT / "docs" / name).read_text() for name in ("errors.md", "errors.zh.md")}
CODE = re.compile(r"AV-\d{4}")
MAKERS = {"coded": 0, "coded_error": 0, "advise": 1, "as_value_error": 2}  # function: the place of its code


@cache
def sources() -> dict[Path, ast.Module]:
    files = [path for package in ("ascend_runtime", "nodes") for path in (ROOT / package).rglob("*.py")]
    return {path: ast.parse(path.read_text()) for path in files if path.name != "errors.py"}


def codes_in(tree: ast.AST) -> list[str]:
    """The string literals that are a code, and nothing else: not those in comments, docstrings or texts."""
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [value for value in values if isinstance(value, str) and CODE.fullmatch(value)]


def rows(text: str) -> dict[str, list[str]]:
    """The other cells of each table row whose first is a code, in order; several rows of one code are joined."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| AV-"):
            found.setdefault(first, []).extend(cells)
    return found


@pytest.fixture(params=DOCUMENTS)
def document(request):
    return DOCUMENTS[request.param]


def test_every_code_that_is_raised_is_listed_and_every_listed_one_is_raised():
    raised = {code for tree in sources().values() for code in codes_in(tree)}
    assert {"not listed": raised - CODES.keys(), "never raised": CODES.keys() - raised} == {
        "not listed": set(), "never raised": set(),
    }  # fmt: skip


def test_every_code_is_explained_with_its_cause_and_what_helps(document):
    explained = rows(document)
    assert sorted(CODES) == sorted(explained)
    assert [code for code, cells in explained.items() if len(cells) != 3 or not all(cells)] == []


def test_the_titles_are_those_of_the_code_and_none_stands_for_two():
    assert {code: cells[0] for code, cells in rows(DOCUMENTS["errors.md"]).items()} == CODES
    for text in DOCUMENTS.values():
        titles = Counter(cells[0] for cells in rows(text).values())
        assert [title for title, count in titles.items() if count > 1] == []


def test_each_code_stands_under_the_heading_of_its_range(document):
    before, *sections = re.split(r"^## (\d\d)xx", document, flags=re.MULTILINE)
    assert not rows(before)
    ranges = dict(zip(sections[::2], sections[1::2]))
    assert list(ranges) == sorted(ranges)
    for first, section in ranges.items():
        codes = list(rows(section))
        assert codes and codes == sorted(codes) and {code[3:5] for code in codes} == {first}


def test_the_chinese_cells_are_chinese():
    plain = [code for code, cells in rows(DOCUMENTS["errors.zh.md"]).items()
             if not all(re.search("[\u4e00-\u9fff]", cell) for cell in cells[:2])]  # fmt: skip
    assert plain == []


def test_no_code_is_put_together():
    """A code is a literal, or handed on by a name, so that these tests see it."""
    for path, tree in sources().items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "id", getattr(call.func, "attr", None))
            if name in MAKERS and len(call.args) > MAKERS[name]:
                code = call.args[MAKERS[name]]
                seen = codes_in(code) or isinstance(code, (ast.Name, ast.Attribute))
                assert seen, f"{path}:{call.lineno} has a code that is not seen"


def test_these_tests_see_codes_in_code_only():
    tree = ast.parse('# AV-1001\ndef f():\n    """As AV-1002."""\n    raise coded_error("AV-1003", "AV-1004: no")')
    assert codes_in(tree) == ["AV-1003"]
    assert rows("| AV-1001 | a | b | c |\n| code | meaning |\n| AV-1001 | d |") == {"AV-1001": ["a", "b", "c", "d"]}


def test_an_error_has_one_code_in_front():
    assert coded("AV-1302", "x is empty") == "AV-1302: x is empty" == str(coded_error("AV-1302", "x is empty"))
    inner = coded("AV-1302", "x is empty")
    assert coded("AV-1309", f"y cannot be used ({inner})") == "AV-1302: y cannot be used (x is empty)"
    with pytest.raises(AssertionError):
        coded("AV-9999", "x")


def test_where_a_code_is_explained_is_said_once():
    assert code_of(ValueError("AV-1302: x")) == "AV-1302" and code_of("x AV-1302: y") is None and code_of("x") is None
    text = with_page("AV-1302: x")
    assert text.startswith("AV-1302: x\n") and all(f"docs/{name}" in text for name in DOCUMENTS)
    assert with_page("x") == "x"
