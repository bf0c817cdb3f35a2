"""The folders of alq/: what each may import, and what no text may mention."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOW = {"errors", "machine"}  # what everything may import
# What each part of the package may import, besides its own modules; from low to high.
MAY_IMPORT = {
    "errors": set(),
    "machine": {"errors"},
    "method": LOW,
    "data": LOW,
    "files": LOW | {"method"},
    "training": LOW | {"method"},
    "inference": LOW | {"method", "files"},
    "extras": LOW | {"method", "training"},
    "command": LOW | {"method", "data", "files", "training", "inference", "extras"},
    "fit": LOW | {"method", "files", "training", "extras", "command"},
    "__main__": {"errors", "command"},
    "__init__": {"method", "files", "training", "inference", "extras", "fit"},
}
OUTSIDE = {path.stem for path in ROOT.glob("*.py")} | {
    path.stem for folder in ("tests", "benchmarks") for path in (ROOT / folder).glob("*.py")
}


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of every module or name that a file of the package imports."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


MODULES = sorted((ROOT / "alq").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_from_high_to_low(path) -> None:
    part = path.relative_to(ROOT / "alq").parts[0].removesuffix(".py")
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in OUTSIDE, f"{path}: imports {name}, which is no part of the package"
        if top == "alq":
            assert rest.split(".")[0] in MAY_IMPORT[part] | {part}, f"{path}: imports {name}"


def test_the_allowed_imports_make_no_circle() -> None:
    """Every part but the package's own __init__ imports only those that are named before it."""
    parts = list(MAY_IMPORT)
    for number, part in enumerate(parts):
        assert MAY_IMPORT[part] <= set(parts[:number]), part
    assert {path.relative_to(ROOT / "alq").parts[0].removesuffix(".py") for path in MODULES} == set(
        parts
    )


SELF_CONTAINED = ["alq", "benchmarks", "data", "docs", "examples", "tests", "README.md"]


@pytest.mark.parametrize("place", SELF_CONTAINED)
def test_no_text_cites_the_specification_which_users_do_not_have(place) -> None:
    found = [ROOT / place, *(ROOT / place).rglob("*")]
    for path in (path for path in found if path.suffix in (".py", ".md")):
        assert not re.search(r"\b[S]PEC\b", path.read_text()), path
