"""output: OUT is absent, old or new, never between; what a killed run left is cleared, what a living one makes is not."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from loratools.errors import OutputError
from loratools.output import check_output, whole


def make_file(out: Path, text: str = "new") -> None:
    with whole(out) as place:
        place.write_text(text)


def make_folder(out: Path, text: str = "new") -> None:
    with whole(out) as place:
        (place / "inner").mkdir(parents=True)
        (place / "inner" / "file").write_text(text)


def text_of(out: Path) -> str | None:
    """What is at OUT, file or folder."""
    if not os.path.lexists(out):
        return None
    return (out / "inner" / "file").read_text() if out.is_dir() else out.read_text()


def names(folder: Path) -> list[str]:
    """All that lies in a folder, hidden things too."""
    return sorted(path.name for path in folder.iterdir())


MAKERS = [make_file, make_folder]
Maker = Callable[..., None]


@pytest.mark.parametrize("make", MAKERS)
def test_the_output_appears_and_nothing_else(tmp_path: Path, make: Maker) -> None:
    make(tmp_path / "deep" / "er" / "out")
    assert text_of(tmp_path / "deep" / "er" / "out") == "new"
    assert names(tmp_path / "deep" / "er") == ["out"]


@pytest.mark.parametrize("before", [None, *MAKERS, "link", "link to a folder", "link to nothing", "empty folder"])
@pytest.mark.parametrize("make", MAKERS)
def test_whatever_was_there_is_replaced_and_links_are_not_followed(tmp_path: Path, make: Maker, before: Maker | str | None) -> None:
    out, target = tmp_path / "out", tmp_path / "target"
    if callable(before):
        before(out, "old")
    elif before == "empty folder":
        out.mkdir()
    elif before is not None:
        out.symlink_to(target)
        if before != "link to nothing":
            (make_folder if before == "link to a folder" else make_file)(target, "kept")
    make(out)
    assert text_of(out) == "new"
    assert not out.is_symlink()
    assert text_of(target) in (None, "kept")
    assert set(names(tmp_path)) <= {"out", "target"}


@pytest.mark.parametrize("before", [None, *MAKERS])
@pytest.mark.parametrize("make", MAKERS)
def test_a_failure_leaves_what_was_there(tmp_path: Path, make: Maker, before: Maker | None) -> None:
    out = tmp_path / "out"
    if before:
        before(out, "old")
    with pytest.raises(KeyError), whole(out) as place:
        place.mkdir()
        raise KeyError
    assert text_of(out) == ("old" if before else None)
    assert names(tmp_path) == (["out"] if before else [])


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "mkdir", "open"])
@pytest.mark.parametrize("before", [None, *MAKERS])
@pytest.mark.parametrize("make", MAKERS)
def test_each_system_call_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Maker, before: Maker | None, call: str) -> None:
    """The n-th call of its kind fails, for n = 1, 2, …: OUT is old or new, a second run makes it new, and nothing else is left."""
    out = tmp_path / "out"
    real = getattr(os, call)
    for failing in range(1, 100):
        if before:
            before(out, "old")
        count = 0

        def fails(*arguments: object, number: int = failing, **options: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            try:
                make(check_output(out, overwrite=True))
            except OutputError as error:
                assert "No space left" in str(error)
                assert str(out) in str(error)
            except OSError as error:
                assert call in ("mkdir", "open") and count >= failing, error  # the test's own writing
        assert text_of(out) in ("old" if before else None, "new")
        make(check_output(out, overwrite=True))
        assert text_of(out) == "new"
        assert names(tmp_path) == ["out"]
        (out / "inner" / "file" if out.is_dir() else out).unlink()
        if out.is_dir():
            (out / "inner").rmdir()
            out.rmdir()
        if count < failing:
            return
    raise AssertionError("never ran through")


def test_companions_come_with_a_file_and_not_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def make(text: str) -> None:
        with whole(out) as place:
            place.write_text(text)
            (place.parent / "out.receipt").write_text(text)

    make("old")
    assert names(tmp_path) == ["out", "out.receipt"]
    real = Path.replace

    def fails(path: Path, place: Path) -> object:
        if path.name == "out" and path.parent.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, place)

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="Input/output"):
        patch.setattr(Path, "replace", fails)
        make("new")
    assert [(tmp_path / name).read_text() for name in ("out", "out.receipt")] == ["old", "old"]
    make("new")
    assert [(tmp_path / name).read_text() for name in ("out", "out.receipt")] == ["new", "new"]
    assert names(tmp_path) == ["out", "out.receipt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from loratools.output import check_output, whole
with whole(check_output(sys.argv[1], overwrite=True)) as place:
    place.mkdir()
    (place / "half").write_text("half")
    real = Path.rename
    def dies(path, target):
        real(path, target)
        os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = dies
    if sys.argv[2] == "making":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(out: Path, when: str) -> None:
    """A run that dies, without a chance to clean up, while it makes its output or when it has just moved the old one aside."""
    code = subprocess.run([sys.executable, "-c", KILLED, str(out), when], check=False).returncode
    assert code == -9


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "o[u]t*"
    killed(out, "making")
    assert len(names(tmp_path)) == 1
    assert not out.exists()
    (tmp_path / ".another.partial-abc").mkdir()
    make_folder(check_output(out, overwrite=False))
    assert names(tmp_path) == [".another.partial-abc", out.name]


def test_what_a_killed_run_had_moved_aside_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_folder(out, "old")
    killed(out, "replacing")
    assert not out.exists()
    with pytest.raises(OutputError, match="exists already"):
        check_output(out, overwrite=False)
    assert text_of(out) == "old"
    assert names(tmp_path) == ["out"]


def test_the_room_of_a_living_run_is_let_be(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with whole(check_output(out, overwrite=False)) as place:
        place.write_text("first")
        code = f"from loratools.output import *; check_output({str(out)!r}, overwrite=False)"
        subprocess.run([sys.executable, "-c", code], check=True)
        check_output(out, overwrite=False)
        assert place.read_text() == "first"
    assert text_of(out) == "first"


def test_without_locks_a_room_is_never_taken_for_a_dead_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    out = tmp_path / "out"
    killed(out, "making")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    make_file(check_output(out, overwrite=False))
    assert text_of(out) == "new"
    assert len(names(tmp_path)) == 2


# -- where OUT may be


def test_an_existing_output_is_refused_unless_empty_or_overwritten(tmp_path: Path) -> None:
    make_folder(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(OutputError, match=f"{name}: exists already.*--overwrite"):
            check_output(tmp_path / name, overwrite=False)
        assert check_output(tmp_path / name, overwrite=True) == tmp_path / name
    assert check_output(tmp_path / "empty", overwrite=False) == tmp_path / "empty"


@pytest.mark.parametrize("out", ["in", "in/", "./in/../in", "in/side/deeper", "link", "link/x", ".", "in/model.safetensors"])
def test_an_output_never_meets_its_input(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors").write_text("")
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"input|working folder"):
        check_output(out, overwrite=True, inputs=["in"])
    assert check_output("in.out", overwrite=True, inputs=["in"]) == Path("in.out")


def test_an_index_stands_for_its_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="inside the input"):
        check_output(tmp_path / "in" / "out", overwrite=False, inputs=[tmp_path / "in" / "model.safetensors.index.json"])
    beside = tmp_path / "in" / "other.safetensors"
    assert check_output(beside, overwrite=False, inputs=[tmp_path / "in" / "model.safetensors"]) == beside


@pytest.mark.parametrize("out", [".", "..", "/", ""])
def test_the_working_folder_and_those_above_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(OutputError, match="working folder"):
        check_output(out, overwrite=True)


def test_links_in_a_circle_are_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OutputError, match="exists already"):
        check_output(tmp_path / "a", overwrite=False, inputs=[tmp_path / "b" / "x"])
    with pytest.raises(OutputError, match="below what is no folder"):
        make_file(check_output(tmp_path / "a" / "x", overwrite=False))


@pytest.mark.parametrize("name", ["file/out", "file/deep/er", "x" * 256])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        make_file(check_output(tmp_path / name, overwrite=False))
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("make", MAKERS)
def test_all_is_on_disk_before_it_is_renamed_and_the_rename_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Maker) -> None:
    opened: dict[int, str] = {}
    events: list[tuple[str, str]] = []
    real_open, real_sync, real_replace = os.open, os.fsync, os.replace

    def open_(path: object, *more: int, **options: object) -> int:
        descriptor = real_open(path, *more, **options)  # type: ignore[call-overload]
        opened[descriptor] = str(path)
        return int(descriptor)

    def sync(descriptor: int) -> None:
        events.append(("sync", opened[descriptor]))
        real_sync(descriptor)

    def replace(source: object, target: object) -> None:
        events.append(("rename", str(target)))
        real_replace(source, target)  # type: ignore[arg-type]

    for name, spy in (("open", open_), ("fsync", sync), ("replace", replace)):
        monkeypatch.setattr(os, name, spy)
    out = tmp_path / "out"
    make(out)
    at = events.index(("rename", str(out)))
    before = {path.partition("/new/")[2] for kind, path in events[:at] if kind == "sync"}
    assert before == ({"out"} if make is make_file else {"out", "out/inner", "out/inner/file"})
    assert events[at + 1 :] == [("sync", str(tmp_path))]


def test_a_room_that_another_run_clears_before_it_is_locked_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = tempfile.mkdtemp, list[str]()

    def raced(**words: object) -> str:
        made.append(real(**words))  # type: ignore[call-overload]
        if len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", raced)
    make_file(tmp_path / "out")
    assert len(made) == 2
    assert names(tmp_path) == ["out"]
