"""The table of faults in the README: every row has a test, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBER_OF_FAULTS = 51


def table() -> list[list[str]]:
    """The rows of the table, each as its cells."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What it survives")[2]
    lines = section.partition("\n## ")[0].splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if "| " in line
    ]
    return [row for row in rows if row[0].isdigit()]


def known_tests(name: str) -> set[str]:
    """The test functions of ``tests/<name>.py``."""
    path = ROOT / "tests" / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_of_faults_is_whole():
    rows = table()
    assert [int(row[0]) for row in rows] == list(range(1, NUMBER_OF_FAULTS + 1))
    assert all(len(row) == 4 and all(row) for row in rows)


def test_every_test_that_the_table_of_faults_names_exists():
    for number, _, seen, tests in table():
        named = re.findall(r"`(test_\w+)::(test_\w+)`", tests)
        honest = tests == "—" and seen.startswith("not tested: ")
        assert named or honest, f"row {number} has none"
        for file, test in named:
            assert test in known_tests(file), f"row {number}: there is no {file}::{test}"
