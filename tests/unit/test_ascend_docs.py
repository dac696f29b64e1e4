"""What docs/ascend.md and its Chinese twin say of variables, dtypes and failures is what the code has, and the Chinese
documents have what the English ones have."""

import re
from pathlib import Path

import pytest
import torch
from ascend_runtime.hardware import host
from ascend_runtime.ops import precision
from ascend_runtime.hardware.environment import NPU, ORIGINAL_VARIABLES, OneOf, WholeNumber
from ascend_runtime.specs.jobs import ATTENTIONS
from benchmarks.ascend import published

ROOT = Path(__file__).resolve().parents[2]
NO_LIMIT = 2**31 - 1
MODELS_OWN = {"ascend.md": "the model's", "ascend.zh.md": "模型的类型"}
DOCUMENTS = {name: (ROOT / "docs" / name).read_text() for name in MODELS_OWN}


def rows(text):
    """The cells of each row of each table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def rows_by_name(text):
    """The other cells of each row whose first is a name in code."""
    return {name[1:-1]: cells for name, *cells in rows(text) if re.fullmatch(r"`\w+`", name)}


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


@pytest.fixture(params=DOCUMENTS)
def document(request):
    return request.param


@pytest.mark.parametrize("row", [*NPU, *ORIGINAL_VARIABLES], ids=lambda row: row.name)
def test_every_variable_with_its_default_and_what_is_legal(document, row):
    cells = rows_by_name(DOCUMENTS[document])[row.name]
    if row in NPU:
        assert cells.pop(0) == (f"`{row.default}`" if row.default is not None else "-")
    if isinstance(row.legal, OneOf):
        assert tuple(quoted(cells[0])) == row.legal.values
    elif isinstance(row.legal, WholeNumber):
        high = [] if row.legal.high == NO_LIMIT else [str(row.legal.high)]
        assert quoted(cells[0]) == [str(row.legal.low), *high]
    assert cells[1]


def test_no_variable_that_is_not_there(document):
    known = {row.name for row in (*NPU, *ORIGINAL_VARIABLES)} | set(ATTENTIONS)
    known |= {name for name, rule in vars(precision).items() if isinstance(rule, precision.DtypeRule)}
    assert set(rows_by_name(DOCUMENTS[document])) == known


def test_every_rule_of_precision(document):
    for name, rule in vars(precision).items():
        if isinstance(rule, precision.DtypeRule):
            cells = rows_by_name(DOCUMENTS[document])[name]
            expected = [_word(rule.on(npu), document) for npu in (False, True)]
            assert cells[:2] == expected and cells[2], name


def _word(dtype: torch.dtype | None, document: str) -> str:
    return MODELS_OWN[document] if dtype is None else str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", ["errors.md", "errors.zh.md"])
def test_the_message_of_every_failure_that_is_cured_is_quoted(name):
    causes = {cells[0]: cells[2] for cells in rows((ROOT / "docs" / name).read_text())}
    for pattern, code, _ in host._CURES:
        messages = [text.replace("...", "call failed,") for text in quoted(causes[code])]
        assert any(re.search(pattern, text) for text in messages), f"{code} does not quote {pattern}"


@pytest.mark.parametrize("name", ["ascend", "first-hour", "errors", "machines"])
def test_both_languages_have_the_same_commands_links_and_tables(name):
    english, chinese = ((ROOT / "docs" / f"{name}{ending}").read_text() for ending in (".md", ".zh.md"))
    code = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    without_comments = [[re.sub(r" +#.*", "", block) for block in code.findall(text)] for text in (english, chinese)]
    assert without_comments[0] == without_comments[1]
    links = [sorted(set(re.findall(r"\((https?://[^)]+)\)", text))) for text in (english, chinese)]
    assert links[0] == links[1]
    assert [len(row) for row in rows(english)] == [len(row) for row in rows(chinese)]
    assert len(re.findall("^#", code.sub("", english), re.M)) == len(re.findall("^#", code.sub("", chinese), re.M))


def test_the_models_that_the_benchmark_looks_for(document):
    for folder in {workload.folder for workload in published.PUBLISHED}:
        assert f"`{folder}`" in DOCUMENTS[document]


def test_the_seconds_that_the_benchmark_compares_with(document):
    """And those of several A2 cards, which it does not compare, by the longest and the shortest."""
    npus = [w for w in published.PUBLISHED if w.kind == "npu"]
    several = [w.seconds for w in npus if w.differs]
    expected = {w.seconds for w in npus if not w.differs} | {max(several), min(several)}
    table = " ".join(" ".join(row) for row in rows(DOCUMENTS[document]) if re.search(r"\d A2|\d A3|张 A|950", row[1]))
    named = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", table)}
    assert expected - named == set()
