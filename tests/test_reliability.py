"""docs/reliability.md names the tests that prove each promise: those that carry its number, and no others."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
NUMBERED = re.compile(r"^(?:test((?:_t\d+)+)_|Test(T\d+)[A-Z])")


def told() -> dict[str, set[str]]:
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    return {row[0].strip("| "): set(re.findall(r"`([\w/.]+\.py)`", row[-1])) for row in rows if len(row) == 4}


def proved() -> dict[str, set[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if (match := NUMBERED.match(node.name)) is not None:
                for number in re.findall(r"\d+", match[0]):
                    found[f"T{number}"].add(path.relative_to(TESTS).as_posix())
    return found


def test_the_page_and_the_suite_agree() -> None:
    rows = {name: files for name, files in told().items() if re.fullmatch(r"T\d+", name)}
    assert list(rows) == [f"T{number}" for number in range(1, 24)]
    assert rows == proved()
