"""Tables fit the terminal, and nothing in them is lost; lists of written files are true."""

import io
import os
import time

import pytest
from rich.console import Console

from restnet_hf.cli import tables
from restnet_hf.cli.outputs import Written, check_output, remove_outputs


COLUMNS = ("route", "MACs, M", "params, K", "value", "R²", "fitted, %", "trained, %")
ROWS = [
    ["mobilenetv3_small_100[:12] + deit_tiny_patch16_224[:7] + resnet50[11:]", "12345.6", "298", "", "", "", "89.9"],
    ["resnet50[:]", "4089.2", "25557", "0.73", "-0.51", "77.4", "100.0"],
]


@pytest.fixture
def shown(monkeypatch):
    def show(width, columns=COLUMNS, rows=ROWS):
        console = Console(file=io.StringIO(), width=width)
        monkeypatch.setattr(tables, "console", console)
        tables.show_table("title", columns, rows)
        return console.file.getvalue().splitlines()

    return show


@pytest.mark.parametrize("width", [80, 100, 200, 60, 20])
def test_nothing_is_cut(shown, width):
    lines = shown(width)
    assert max(map(len, lines)) <= max(width, 76)
    text = "\n".join(lines)
    assert "…" not in text and "..." not in text
    for row in ROWS:
        assert all(number in text for number in row[1:])
    start = next(index for index, line in enumerate(lines) if "─" in line) + 1
    first = [line[: line.index("12345.6")] if "12345.6" in line else line for line in lines[start:-1]]
    assert "".join("".join(first).split()).startswith(ROWS[0][0].replace(" ", ""))


def test_a_wide_terminal_needs_no_second_line(shown):
    assert len(shown(200)) == 6  # title, two lines of headings, rule, two rows


def test_texts_share_what_is_left(shown):
    why = "stopped after 64 of 500 images with accuracy=0.5: it cannot win"
    lines = shown(80, ("rejected", "because"), [[ROWS[0][0], why]])
    assert max(map(len, lines)) <= 80 and all(word in "\n".join(lines) for word in why.split())


@pytest.mark.parametrize(("images", "warned"), [(1, "1 image is"), (4, "4 images are"), (99, "99"), (100, None)])
def test_few_images_warn(capsys, monkeypatch, images, warned):
    monkeypatch.setattr(tables, "errors", Console(stderr=True))
    tables.warn_of_few(images, "accuracy")
    shown = capsys.readouterr()
    assert shown.out == "" and (shown.err == "" if warned is None else f"{warned} " in shown.err)


def test_only_what_was_written_is_listed(tmp_path):
    (tmp_path / "old.txt").touch()
    os.utime(tmp_path / "old.txt", (0, 0))
    (tmp_path / "adapter").mkdir()
    os.utime(tmp_path / "adapter", (0, 0))
    written = Written(tmp_path, hidden={"training"})
    time.sleep(0.01)
    for name in ("adapter/model.safetensors", "report.json"):
        (tmp_path / name).touch()
    (tmp_path / "training").mkdir()
    os.utime(tmp_path / "adapter", (0, 0))  # a file in it is new
    assert str(written) == f"written to {tmp_path}: adapter/, report.json"


def test_overwriting_removes_our_files_alone(tmp_path):
    for name in ("mine.txt", "report.json"):
        (tmp_path / name).touch()
    (tmp_path / "training" / "stitches").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="--overwrite"):
        check_output(tmp_path, False)
    check_output(tmp_path, True)
    remove_outputs(tmp_path, ("adapter", "report.json", "training"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_may_be_written_to(tmp_path):
    check_output(tmp_path, False)
    check_output(tmp_path / "new", False)
