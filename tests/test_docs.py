"""What the documents point at is there: functions, files, sections, flags, defaults."""

from __future__ import annotations

import importlib
import re
import shlex
from argparse import ArgumentParser
from functools import reduce
from pathlib import Path

import pytest

import alq
import lenet5
import resnet
import vgg
from alq.command.flags import MAY_CHANGE
from alq.command.report import layer_table

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data" / "README.md"])
SCRIPTS = {"lenet5.py": lenet5, "vgg.py": vgg, "resnet.py": resnet}
FOLDERS = "alq|tests|benchmarks|docs|data|checkpoints/published"  # whose files may be named


def found(pattern: str) -> list:
    """(document, match) for every match, as parameters with readable names."""
    return [
        pytest.param(document, match, id=f"{document.name}-{match[0][:60]}")
        for document in DOCUMENTS
        for match in re.finditer(pattern, document.read_text())
    ]


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("document, match", found(r"`(alq/[\w/]+)\.py:([\w.]+)`"))
def test_a_function_that_is_named_exists(document: Path, match: re.Match) -> None:
    module = importlib.import_module(match[1].replace("/", "."))
    reduce(getattr, match[2].split("."), module)


@pytest.mark.parametrize("document, match", found(r"\]\(((?!https?:)[^)#]*)(?:#([^)]*))?\)"))
def test_a_link_leads_somewhere(document: Path, match: re.Match) -> None:
    target = document.parent / match[1] if match[1] else document
    assert target.exists()
    assert match[2] is None or match[2] in anchors(target)


@pytest.mark.parametrize("document, match", found(rf"`((?:{FOLDERS})/[\w./-]*)(?::[\w.]+)?`"))
def test_a_file_that_is_named_exists(document: Path, match: re.Match) -> None:
    assert (ROOT / match[1]).exists()


@pytest.mark.parametrize(
    "document, match",
    found(r"(?m)^ {4}(?:\$ )?(?:python|torchrun .* --) (\w+\.py)((?: .*\\\n)* .*)$"),
)
def test_a_command_is_understood(document: Path, match: re.Match, monkeypatch, tmp_path) -> None:
    script = SCRIPTS[match[1]]

    def parse(recipe: object, parser: ArgumentParser, argv: list[str]) -> None:
        parser.parse_args(argv)

    monkeypatch.setattr(script, "run_stages", parse)
    script.main(shlex.split(match[2].replace("\\\n", " "), comments=True))


def test_a_line_that_the_code_names_is_in_the_method() -> None:
    lines = re.findall(
        r"^    ([A-Z]\d)    ", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE
    )
    assert len(lines) == len(set(lines)) > 30
    code = "".join(path.read_text() for path in (ROOT / "alq" / "method").glob("*.py"))
    named = set(re.findall(r"# ([A-Z]\d)\b", code))
    assert named and named <= set(lines)


def test_the_defaults_of_the_method_are_those_of_the_scripts() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    rows = re.findall(r"^\| `--(\w+)` \| (\S*) ?\| (\S*) ?\| (\S*) ?\|$", text, re.MULTILINE)
    assert len(rows) > 15
    defaults = [lenet5.DEFAULTS, vgg.DEFAULTS, *map(resnet.defaults, resnet.LAYERS)]
    for flag, *cells in rows:
        for cell, own in zip([*cells, cells[-1]], defaults, strict=True):
            value = own.get(flag)
            value = value[0] if isinstance(value, list) else value
            assert (float(cell) if cell else None) == value, flag


def test_the_flags_that_may_change_on_resuming_are_listed() -> None:
    text = (ROOT / "docs" / "files-and-resume.md").read_text()
    (listed,) = re.findall(r"These may differ: ([^.]*)\.", text)
    assert set(re.findall(r"`--(\w+)`", listed)) == set(MAY_CHANGE)


def test_the_readme_shows_what_evaluating_the_small_file_prints() -> None:
    weights = alq.load_packed(ROOT / "checkpoints/published/lenet5.alq", lenet5.LeNet5())
    readme = (ROOT / "README.md").read_text()
    assert all(f"    {line}\n" in readme for line in layer_table(weights).splitlines())
