"""docs/a-request.md follows a request through functions by name: each has to exist in the file that is linked."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "a-request.md"
REFERENCE = re.compile(r"`([A-Za-z_]\w*(?:\.\w+)?)`|\]\(\.\./([\w/]+\.py)\)")


def defined_names(path):
    """Give the functions, classes and `Class.method`s of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def all_names():
    return set().union(*(defined_names(path) for path in (ROOT / "dejavu").rglob("*.py")))


def test_every_name_exists():
    known = all_names()
    names = {match[1] for match in REFERENCE.finditer(PAGE.read_text(encoding="utf-8")) if match[1]}
    missing = {name for name in names if name not in known} - {"Class.method"}
    assert not missing
    assert len(names) > 40


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\(\.\./([\w/]+\.py)\)", PAGE.read_text(encoding="utf-8")))))
def test_every_linked_file_exists(path):
    assert (ROOT / path).is_file()


def test_a_name_that_is_said_to_be_of_a_file_is_defined_there():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    pairs = re.findall(r"`([\w.]+)`,? of \[[^\]]*\]\(\.\./([\w/]+\.py)\)", text)
    assert len(pairs) > 15
    for name, path in pairs:
        assert name in defined_names(ROOT / path), (name, path)
