"""Where results are written: looked at before the work, whole or not there, and nothing left behind by an error."""

import errno
import json
import os
import threading

import pytest

from utils.cli import UserError, first_line
from utils.files import atomic_write, check_output_file, output_folder, replacing, write_json

FOLDERS = [
    ("eval.py", []), ("export.py", []), ("visualize.py", []), ("visualize.py", ["--figure", "2"]),
    ("tools.hessian", ["--model_path"]),
]  # fmt: skip
FILES = [
    ("tools.average", ["r", "--epochs", "1", "--out"]), ("tools.benchmark", ["--json"]),
    ("tools.benchmark_deploy", ["--json"]),
]  # fmt: skip


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n\x1b[31mred\x1b[0m\nsecond")) == "red"
    assert first_line(ValueError()) == first_line(ValueError(" \n")) == "ValueError"


@pytest.mark.parametrize("script, flags", FOLDERS)
def test_an_output_folder_that_cannot_be_is_told_first(rejected, tmp_path, script, flags):
    """Before the checkpoint, which is not there either, is looked at."""
    (tmp_path / "taken").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for out, reason in (
        ("taken", "taken is not a folder"),
        ("taken/x/y", "taken is not a folder"),
        ("gone", "gone is no"),
    ):
        message = rejected(script, *flags, "--out", out)
        assert f"--out {out} cannot be made ({reason}" in message and "name another folder" in message
    assert "(File name too long)" in rejected(script, *flags, "--out", f"{'x' * 300}/y")


@pytest.mark.parametrize("script, flags", FILES)
def test_an_output_file_that_cannot_be_is_told_first(rejected, tmp_path, script, flags):
    (tmp_path / "taken").mkdir()
    assert f"{flags[-1]} taken is a folder: name a file" in rejected(script, *flags, "taken")
    assert f"{flags[-1]} a/b cannot be written: there is no folder a; make it" in rejected(script, *flags, "a/b")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody may write")
def test_a_folder_without_rights(rejected):
    """/proc, as root may write anywhere else."""
    assert "--out /proc/self cannot be written to (" in rejected("eval.py", "--out", "/proc/self")
    with pytest.raises(UserError, match="^--json /proc/self/x cannot be written to "):
        check_output_file("--json", "/proc/self/x")


@pytest.mark.parametrize("script", ["eval.py", "export.py", "visualize.py", "tools.hessian"])
def test_an_error_leaves_no_empty_folder(rejected, tmp_path, script):
    assert "no checkpoint at no.pth" in rejected(script, "--model_path", "no.pth", "--out", "a/b")


def test_a_folder_that_was_there_or_holds_something_stays(tmp_path):
    for name, inside in (("old", None), ("new/deep", "x.csv")):
        if not inside:
            (tmp_path / name).mkdir()
        with pytest.raises(ZeroDivisionError), output_folder("--out", tmp_path / name) as folder:
            if inside:
                (folder / inside).write_text("")
            1 / 0  # noqa: B018
        assert folder.is_dir()
    with pytest.raises(KeyboardInterrupt), output_folder("--out", tmp_path / "a/b"):
        raise KeyboardInterrupt
    assert not (tmp_path / "a").exists()


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Each is halfway when the other begins: the file is the last one's, whole."""
    path, half = tmp_path / "x", threading.Barrier(2)

    def write(letter):
        with atomic_write(path) as file:
            file.write(letter * 1000)
            file.flush()
            half.wait(10)
            file.write(letter * 1000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b"a" * 2000, b"b" * 2000)
    assert [*tmp_path.iterdir()] == [path]
    assert path.stat().st_mode == open_mode(tmp_path)


def open_mode(folder):
    """The rights that `open` gives a new file."""
    (folder / "y").write_text("")
    return (folder / "y").stat().st_mode


def test_a_name_for_each_writing_in_an_existing_place(tmp_path):
    path = tmp_path / ("x" * 250)  # about as long as a name may be
    with replacing(path) as one, replacing(path) as other:
        assert one != other and one.parent == other.parent == tmp_path
        one.write_text("1")
        other.write_text("2")
    assert path.read_text() == "1" and [*tmp_path.iterdir()] == [path]
    with pytest.raises(UserError, match="is a folder: name a file"), replacing(tmp_path):
        pass
    with pytest.raises(UserError, match=r"could not be written \(No space left on device\)"), replacing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(UserError, match=r"could not be written \(OSError\)"), replacing(path):
        raise OSError
    assert path.read_text() == "1"


def test_an_export_that_fails_leaves_what_was_there(cli, tmp_path, digits_run):
    pytest.importorskip("onnxruntime")
    (tmp_path / "deploy/last_w4.onnx").mkdir(parents=True)
    outcome = cli("export.py", "--model_path", digits_run)
    assert outcome.code == 2 and "deploy/last_w4.onnx is a folder: name a file" in outcome.err
    assert [path.name for path in (tmp_path / "deploy").iterdir()] == ["last_w4.onnx"]


def test_json_has_no_number_that_is_none(tmp_path):
    write_json(tmp_path / "x.json", {"rows": [{"loss": float("nan"), "top1": 1.5}], "top": (float("inf"), 2)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"rows": [{"loss": None, "top1": 1.5}], "top": [None, 2]}
