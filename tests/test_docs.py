"""What the documents point at is there: functions, files, sections, flags, defaults."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from argparse import ArgumentParser
from functools import reduce
from pathlib import Path
from statistics import mean

import pytest
import torch

import alq
import lenet5
import resnet
import small_files
import vgg
from alq.command.flags import MAY_CHANGE
from alq.command.report import layer_table, network_lines, parts_line, summary_table
from alq.files.packed import read_packed
from alq.training.loop import size_of
from alq.training.schedule import alq_schedule, posttrain_schedule, pretrain_schedule
from networks import NETWORKS
from published_runs import Run, read_runs

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data" / "README.md"])
SCRIPTS = {"lenet5.py": lenet5, "vgg.py": vgg, "resnet.py": resnet}
PUBLISHED = ROOT / "checkpoints" / "published"
FOLDERS = "alq|tests|benchmarks|docs|data|examples|checkpoints/published"  # whose files are named


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


# ---------------------------------------------------------------------------- figures


def readme() -> str:
    return (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def default_runs() -> list[Run]:
    """The published runs of LeNet5's default schedule."""
    runs = [run for run in read_runs(PUBLISHED) if run.default]
    return [run for run in runs if (run.net, run.dataset) == ("lenet5", "mnist")]


def test_the_readme_shows_what_evaluating_the_small_file_prints(default_runs) -> None:
    """All but the accuracy, which is that of the log, follows from the file."""
    packed = PUBLISHED / "lenet5.alq"
    model = lenet5.LeNet5()
    weights = alq.load_packed(packed, model)
    result = {
        "stage": "packing", "top1_fp": None, "top1": default_runs[0].final["top1"],
        "file_bytes": packed.stat().st_size, **size_of(weights),
    }  # fmt: skip
    numel = sum(weight.grouping.numel for weight in weights)
    printed = [
        *layer_table(weights).splitlines(),
        *summary_table(result, lenet5.PUBLISHED, numel).splitlines(),
        *network_lines(model, weights).splitlines(),
        f"{packed.relative_to(ROOT)}: {parts_line(read_packed(packed).sizes)}",
    ]
    assert [line for line in printed if f"    {line}\n" not in readme()] == []
    assert f"from its file of {round(packed.stat().st_size / 1e3)} KB" in readme()


def test_the_first_lines_of_the_readme_have_the_row_of_the_logs(default_runs) -> None:
    bits, size, top1 = (
        mean(run.final[key] for run in default_runs)
        for key in ("bitwidth", "storage_bytes", "top1")
    )
    first = " ".join(readme().split("\n!")[0].split())
    assert f"{bits:.3f} bit a weight, {size / 1e3:.1f} KB and {top1:.2f} %" in first
    assert len(default_runs) == 3 and "mean of three runs" in first
    paper = lenet5.PUBLISHED
    row = f"{paper['bitwidth']:.2f} bit, {paper['storage_bytes'] / 1e3:.1f} KB and {paper['top1']}"
    assert f"the paper has {row} %" in first


def test_the_readme_says_how_long_the_commands_train(default_runs) -> None:
    epochs = []
    for net in ("lenet5", "vgg", "resnet18"):
        args = NETWORKS[net].default_flags()
        stages = [alq_schedule(args, args.R), posttrain_schedule(args)]
        if net != "resnet18":  # whose command downloads
            stages.append(pretrain_schedule(args))
        epochs.append(sum(map(len, stages)))
    assert "train for {}, {} and {} epochs".format(*epochs) in readme()
    seconds = (
        sum(stage.result["seconds"] for stage in run.stages.values()) for run in default_runs
    )
    assert f"`lenet5.py` took {mean(seconds) / 3600:.1f} hours" in readme()


def test_the_bytes_of_a_smaller_file_are_those_of_the_published_networks(tmp_path) -> None:
    pattern = r"^\| (.*) \| (\d+) \| [\d.]+ \| (\d+) \| [\d.]+ \|$"
    rows = re.findall(pattern, (ROOT / "docs/small-networks.md").read_text(), re.MULTILINE)
    flags = {f"`{flags}`" if flags else "none": flags for flags in small_files.ROWS}
    assert [name for name, *_ in rows] == list(flags)
    for name, *sizes in rows:
        for file, size in zip(small_files.FILES, map(int, sizes), strict=True):
            _, found = small_files.packed(file, flags[name], tmp_path, torch.randn(2, 1, 28, 28))
            # The names in the file are deflated, not by every zlib to the same byte.
            assert found == pytest.approx(size, abs=16), (name, file)


def test_the_loaders_figures_are_those_of_the_measurement() -> None:
    text = (ROOT / "docs" / "devices.md").read_text()
    found = json.loads((ROOT / "benchmarks" / "results" / "loader.json").read_text())
    section = text[text.index("## Reading ILSVRC12") :]
    told = re.findall(r"^\| .* \| (\d+) \|$", section[: section.index("\n## ")], re.MULTILINE)
    assert list(map(int, told)) == [round(rate) for rate in found["rows"].values()]
    apart = found["beside Pillow"]
    assert f"at most {apart['largest']} of 255, in {100 * apart['share of values']:.1f} %" in text
