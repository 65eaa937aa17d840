"""Files are whole or absent, whatever fails: each fault is made to happen, proved to have happened, and its text is read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerwise import files
from layerwise.errors import CorruptRun, DiskFull, OutputBusy, RunError, UsageError
from layerwise.files import atomic, folder


def temporaries(place: Path) -> list[str]:
    return [p.name for p in place.rglob("*.tmp")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: a real one, so that the kernel says ENOSPC."""
    place = tmp_path / "small"
    place.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


# One file.


def test_write_atomic_replaces_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_atomic(path, "第一\n")
    files.write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()  # not the 0600 of mkstemp: colleagues read results


def current_umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_the_order_is_sync_file_then_replace_then_sync_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        calls.append("sync " + ("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    files.write_atomic(tmp_path / "a", b"x")
    assert calls == ["sync file", "replace", "sync folder"]


def test_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    path = small_disk / "checkpoint"
    files.write_atomic(path, b"old")
    with pytest.raises(DiskFull) as caught:
        files.write_atomic(path, bytes(3 << 20))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC  # the kernel said so
    assert re.search(r"LW-R02 .*checkpoint: The disk is full: needs 3,145,728 bytes, [\d,]+ bytes are free", str(caught.value))
    assert path.read_bytes() == b"old"
    assert temporaries(small_disk) == []


def test_full_disk_in_a_staged_folder_keeps_the_old_folder(small_disk: Path) -> None:
    with files.staged_folder(small_disk / "run") as run:
        (run / "a").write_bytes(b"old")
    with (
        pytest.raises(DiskFull, match=r"LW-R02 .*more than was left") as caught,
        files.staged_folder(small_disk / "run", force=True) as run,
    ):
        (run / "a").write_bytes(bytes(3 << 20))
    assert getattr(caught.value.__cause__, "errno", 0) == errno.ENOSPC
    assert (small_disk / "run" / "a").read_bytes() == b"old"
    files.verify_manifest(small_disk / "run")
    assert temporaries(small_disk) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_device(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="LW-R02") as caught, files.disk_errors(tmp_path / "x", 4):
        Path("/dev/full").write_bytes(b"text")
    assert getattr(caught.value.__cause__, "errno", 0) == errno.ENOSPC


def test_quota_is_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="LW-R02"), files.disk_errors(tmp_path):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_need_space(tmp_path: Path) -> None:
    files.need_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(DiskFull, match=r"LW-R02 .*needs 1,152,921,504,606,846,976 bytes, [\d,]+ bytes are free"):
        files.need_space(tmp_path / "x", 1 << 60)
    with pytest.raises(DiskFull), files.staged_file(tmp_path / "x", size=1 << 60):
        pytest.fail("the block ran without the space it needs")


@pytest.mark.parametrize("which", ["file", "folder"])
def test_a_failed_sync_is_not_saved_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    path = tmp_path / "a"
    files.write_atomic(path, b"old")
    failed: list[int] = []
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == (which == "folder"):
            failed.append(descriptor)
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=r"LW-R09 .*could not be saved: Input/output error"):
        files.write_atomic(path, b"new")
    assert len(failed) == 1
    assert temporaries(tmp_path) == []
    if which == "file":
        assert path.read_bytes() == b"old"


def test_a_read_only_disk_is_a_usage_error(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UsageError, match=r"LW-C06 .*Read-only file system") as caught:
        files.write_atomic(small_disk / "a", b"x")
    assert getattr(caught.value.__cause__, "errno", 0) == errno.EROFS


def test_no_permission_is_a_usage_error(tmp_path: Path) -> None:
    """In a forked child without root, since root may write everywhere."""
    tmp_path.chmod(0o555)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                files.write_atomic(tmp_path / "a", b"x")
            except BaseException as error:
                os.write(write, f"{type(error).__name__} {error} errno={error.__cause__.errno}".encode())  # type: ignore[union-attr]
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    tmp_path.chmod(0o755)
    # Above tmp_path a folder may be closed to others: then the kernel refuses one step earlier, with the same number.
    assert text.startswith("UsageError LW-C06")
    assert "Permission denied" in text
    assert f"errno={errno.EACCES}" in text


@pytest.mark.parametrize("path", ["missing/a", ".", "a" * 300])
def test_a_wrong_path_is_a_usage_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match=r"LW-C05 .*is not a place to write to"):
        files.write_atomic(tmp_path / path, b"x")
    assert os.listdir(tmp_path) == []


def test_staged_file_moves_or_removes(tmp_path: Path) -> None:
    with files.staged_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "new"
    with pytest.raises(KeyboardInterrupt), files.staged_file(tmp_path / "a") as temporary:  # noqa: PT012 a Ctrl-C midway
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "new"
    assert temporaries(tmp_path) == []


def test_errors_of_the_callers_own_files_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.staged_file(tmp_path / "a"):
        open(tmp_path / "input that is missing")  # noqa: SIM115 the open itself fails


WRITER = """
import sys
from layerwise.files import write_atomic
path, size = sys.argv[1], int(sys.argv[2])
version = int(sys.argv[3]) << 32
while True:
    version += 1
    write_atomic(path, version.to_bytes(8, "little") * (size // 8))
    print(version, flush=True)
"""


def kill_writers(path: Path, kills: int, size: int) -> tuple[int, int]:
    """Kill a process that rewrites `path` `kills` times, each at a random moment; counts versions seen and half files left."""
    chance = random.Random(0)
    begin = time.monotonic()
    files.write_atomic(path, bytes(size))
    once = time.monotonic() - begin  # a slow disk needs later kills
    seen, halves = set(), 0
    for number in range(kills):
        command = [sys.executable, "-c", WRITER, str(path), str(size), str(number + 1)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # one whole version is there
        time.sleep(chance.uniform(0, 4 * once))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        content = path.read_bytes()
        assert len(content) == size
        assert content == content[:8] * (size // 8), "a torn file under the final name"
        seen.add(content[:8])
        for rest in path.parent.glob(".*.tmp"):
            halves += 1
            rest.unlink()
    return len(seen), halves


def test_kill_9_leaves_a_whole_version(tmp_path: Path) -> None:
    seen, halves = kill_writers(tmp_path / "big", kills=15, size=8 << 20)
    assert seen == 15  # each process wrote versions of its own
    assert halves >= 1, "no kill fell into a write: nothing was proved"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_kill_9_leaves_a_whole_version_250_times(tmp_path: Path) -> None:
    seen, halves = kill_writers(tmp_path / "big", kills=250, size=8 << 20)
    print(f"250 kills: 0 torn files, {seen} versions seen, {halves} kills fell into a write")
    assert halves >= 25


# A folder and its manifest.


def make(path: Path, **kept: bytes) -> Path:
    with files.staged_folder(path) as run:
        (run / "deep").mkdir()
        for name, content in (kept or {"weights": b"w" * 1000, "config": b"c"}).items():
            (run / "deep" / name).write_bytes(content)
    return path


def test_staged_folder_gets_a_manifest_of_everything(tmp_path: Path) -> None:
    run = make(tmp_path / "new" / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["files"]["deep/config"] == {"sha256": hashlib.sha256(b"c").hexdigest(), "bytes": 1}
    assert set(manifest["files"]) == {"deep/weights", "deep/config"}
    files.verify_manifest(run)
    assert os.listdir(run.parent) == ["run"]


def test_every_file_and_folder_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, rename = os.fsync, os.rename

    def note(descriptor: int) -> None:
        steps.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append("RENAME"), rename(a, b)))
    make(tmp_path / "run")
    before, after = steps[: steps.index("RENAME")], steps[steps.index("RENAME") + 1 :]
    assert {"weights", "config", "deep"} <= set(before)
    manifest = next(i for i, step in enumerate(before) if "manifest.json" in step)
    assert manifest > max(before.index("weights"), before.index("config"))  # last of the files
    assert after == [tmp_path.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException], exists: bool) -> None:
    if exists:
        make(tmp_path / "run")
    with pytest.raises(error), files.staged_folder(tmp_path / "run", force=exists) as run:  # noqa: PT012 midway
        (run / "half").write_bytes(b"x")
        raise error
    assert os.listdir(tmp_path) == (["run"] if exists else [])
    if exists:
        files.verify_manifest(tmp_path / "run")


def test_existing_output_is_refused_without_force(tmp_path: Path) -> None:
    make(tmp_path / "run")
    with pytest.raises(UsageError, match=r"LW-C07 .*run: output exists\. .*--force"), files.staged_folder(tmp_path / "run"):
        pytest.fail("the block ran")


def test_output_that_appears_meanwhile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="LW-C07"), files.staged_folder(tmp_path / "run") as run:  # noqa: PT012 a race
        (run / "mine").touch()
        make(tmp_path / "run", other=b"theirs")
    assert (tmp_path / "run" / "deep" / "other").read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("atomic_swap", [True, False])
def test_force_replaces_only_after_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic_swap: bool
) -> None:
    if not atomic_swap:
        monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    make(tmp_path / "run", old=b"old")
    with files.staged_folder(tmp_path / "run", force=True) as run:
        (run / "new").write_bytes(b"new")
        files.verify_manifest(tmp_path / "run")
        assert (tmp_path / "run" / "deep" / "old").read_bytes() == b"old"
    files.verify_manifest(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"new", "manifest.json"}
    assert os.listdir(tmp_path) == ["run"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "run", old=b"old")
    monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    rename, tries = os.rename, []

    def fail_second(source: str, target: str) -> None:
        tries.append(target)
        if len(tries) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(RunError, match="LW-R09"), files.staged_folder(tmp_path / "run", force=True) as run:
        (run / "new").touch()
    assert len(tries) == 3
    files.verify_manifest(tmp_path / "run")
    assert (tmp_path / "run" / "deep" / "old").read_bytes() == b"old"


def test_force_never_removes_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project" / "src").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "src")
    with pytest.raises(UsageError, match="LW-C08"), files.staged_folder(tmp_path / "project", force=True):
        pytest.fail("the block ran")
    with pytest.raises(UsageError, match="LW-C05"), files.staged_folder(Path(__file__), force=True):
        pytest.fail("the block ran")


def test_a_pipe_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'pipe' is not a regular file"), files.staged_folder(tmp_path / "run") as run:
        os.mkfifo(run / "pipe")
    assert os.listdir(tmp_path) == []


def test_verify_lists_every_problem(tmp_path: Path) -> None:
    run = make(tmp_path / "run", a=b"a", b=b"b", c=b"c", d=b"d")
    (run / "deep" / "a").unlink()
    (run / "deep" / "b").write_bytes(b"B")
    (run / "deep" / "c").unlink()
    os.mkfifo(run / "deep" / "c")  # must not hang
    (run / "deep" / "extra").touch()
    with pytest.raises(CorruptRun) as caught:
        files.verify_manifest(run)
    assert caught.value.code == "LW-R11"
    assert caught.value.place == str(run)
    assert "missing deep/a, changed deep/b, changed deep/c, unexpected deep/extra." in str(caught.value)
    assert "Do not use it" in caught.value.remedy


def test_leftovers_of_a_killed_write_are_not_unexpected(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    atomic.beside(run / "scores").write_bytes(b"half")
    files.verify_manifest(run)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "has no manifest.json"),
        (b"", "is not readable JSON"),
        (b"\xff\xfe", "is not readable JSON"),
        (b"[" * 200_000, "is not readable JSON"),
        (b'{"format": 2, "files": {}}', "is not a manifest of format 1"),
        (b'{"format": 1, "files": {"a": {"bytes": "1"}}}', "has no sha256 and bytes for 'a'"),
    ],
)
def test_a_broken_manifest_is_a_corrupt_run(tmp_path: Path, content: bytes | None, text: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptRun, match=f"LW-R11 .*{text}"):
        files.verify_manifest(tmp_path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("victim", ["deep/weights", "deep/config", "manifest.json"])
def test_newest_intact_skips_a_damaged_checkpoint(tmp_path: Path, damage: Callable[[Path], None], victim: str) -> None:
    older, newer = make(tmp_path / "step-9"), make(tmp_path / "step-10")
    assert files.newest_intact([older, newer]) == (newer, [])
    damage(newer / victim)
    found, skipped = files.newest_intact([older, newer])
    assert found == older
    [(place, reason)] = skipped
    assert place == newer
    assert "LW-R11" in reason
    assert victim.removeprefix("deep/").removesuffix(".json") in reason
    damage(older / "deep" / "weights")
    found, skipped = files.newest_intact([older, newer])
    assert found is None
    assert [place for place, _ in skipped] == [newer, older]


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# The lock of an output.

HOLDER = """
import sys, time
from layerwise.errors import OutputBusy
from layerwise.files import output_lock
print("ready", flush=True)
sys.stdin.readline()
try:
    with output_lock(sys.argv[1]):
        print("won", flush=True)
        sys.stdin.readline()
except OutputBusy as error:
    print(error, flush=True)
"""


def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert line(process) == "ready"
    return process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def finish(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.communicate("\n", timeout=20)
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def race(path: Path, runners: int) -> None:
    """Start `runners` at once: exactly one wins, and the others name its pid."""
    processes = [holder(path) for _ in range(runners)]
    for process in processes:
        go(process)
    answers = {process.pid: line(process) for process in processes}
    winners = [pid for pid, answer in answers.items() if answer == "won"]
    assert len(winners) == 1, answers
    for pid, answer in answers.items():
        assert pid in winners or (answer.startswith("LW-R23") and f"process {winners[0]} on" in answer)
    for process in processes:
        finish(process)
    assert not path.with_name("run.lock").exists()


def test_of_eight_at_once_one_wins(tmp_path: Path) -> None:
    race(tmp_path / "run", 8)


def test_of_eight_takers_of_a_stale_lock_one_wins(tmp_path: Path) -> None:
    dead = holder(tmp_path / "run")
    go(dead)
    assert line(dead) == "won"
    dead.kill()
    dead.wait()
    finish(dead)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == dead.pid  # the lock is there, its holder is not
    race(tmp_path / "run", 8)


def test_a_killed_but_unreaped_holder_is_dead(tmp_path: Path) -> None:
    dead = holder(tmp_path / "run")
    go(dead)
    assert line(dead) == "won"
    os.kill(dead.pid, signal.SIGKILL)
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # a zombie: still known to kill(pid, 0)
    os.kill(dead.pid, 0)
    with files.output_lock(tmp_path / "run") as lock:
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    dead.wait()
    finish(dead)


def test_taking_over_removes_what_the_dead_left(tmp_path: Path) -> None:
    dead = holder(tmp_path / "run")
    go(dead)
    assert line(dead) == "won"
    (tmp_path / "run").mkdir()
    (tmp_path / f".run.{dead.pid}-0123abcd.tmp").mkdir()
    (tmp_path / "run" / f".scores.{dead.pid}-0123abcd.tmp").touch()
    (tmp_path / "run" / f".scores.{os.getpid()}-0123abcd.tmp").touch()
    dead.kill()
    dead.wait()
    finish(dead)
    with files.output_lock(tmp_path / "run"):
        assert temporaries(tmp_path) == [f".scores.{os.getpid()}-0123abcd.tmp"]


def write_lock(path: Path, **changes: object) -> None:
    with files.output_lock(path) as lock:
        content = json.loads(lock.read_text())
    lock.write_text(json.dumps(content | changes))


def test_a_reused_pid_is_not_the_holder(tmp_path: Path) -> None:
    write_lock(tmp_path / "run", ticks=1)
    with files.output_lock(tmp_path / "run") as lock:
        assert json.loads(lock.read_text())["ticks"] != 1


def test_the_lock_of_another_host_is_believed(tmp_path: Path) -> None:
    write_lock(tmp_path / "run", host="elsewhere", pid=2**30)
    with (
        pytest.raises(OutputBusy, match=r"LW-R23 .*process 1073741824 on elsewhere .*delete run.lock"),
        files.output_lock(tmp_path / "run"),
    ):
        pytest.fail("the block ran")


@pytest.mark.parametrize("content", ["", '{"pid": 1', "[]", '{"pid": "x"}'])
def test_a_torn_lock_is_stale(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.lock").write_text(content)
    with files.output_lock(tmp_path / "run") as lock:
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


def test_the_lock_is_released_after_an_error_and_held_against_oneself(tmp_path: Path) -> None:
    busy = pytest.raises(OutputBusy, match=f"process {os.getpid()} ")
    with pytest.raises(ValueError, match="mine"), files.output_lock(tmp_path / "run"):  # noqa: PT012 two things of one lock
        with busy, files.output_lock(tmp_path / "run"):
            pytest.fail("the block ran")
        raise ValueError("mine")
    assert os.listdir(tmp_path) == []


def test_a_lock_that_another_holds_by_now_is_left_alone(tmp_path: Path) -> None:
    with files.output_lock(tmp_path / "run") as lock:
        content = json.loads(lock.read_text())
        lock.write_text(json.dumps(content | {"pid": 1}))
    assert json.loads(lock.read_text())["pid"] == 1
