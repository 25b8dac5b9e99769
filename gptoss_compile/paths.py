"""Where files go: the user's cache, directories that appear whole or not at all, and content hashes. Stdlib
only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

Progress = Callable[[int, int], None]  # (bytes done, bytes in all); may be called from any thread
_CHUNK = 4 << 20


def cache_dir() -> Path:
    """The user's cache: $GPTOSS_CACHE_ROOT, else gptoss-compile under $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("GPTOSS_CACHE_ROOT")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "gptoss-compile"


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A new directory to fill, beside `path`; at the end it is synced to disk and takes the place of `path`.

    On an exception it is removed and `path` is as it was. A process killed outright leaves its directory
    behind under a hidden name, without the lock that a living writer holds; the next writer of the same path
    removes it.
    """
    path = path.resolve()  # where a link leads, so that the link stays
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.partial-"
    _sweep(path.parent, prefix)
    temporary, lock = _locked_directory(path.parent, prefix)
    try:
        temporary.chmod(0o755)  # mkdtemp's 0700 is for secrets
        yield temporary
        _sync(temporary)
        _replace(temporary, path, prefix)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _locked_directory(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new directory and the descriptor that holds its lock. Before it has the lock, another writer may sweep it away."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):
            lock = os.open(directory, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if directory.exists():
                return directory, lock
            os.close(lock)


def _sweep(parent: Path, prefix: str) -> None:
    for leftover in parent.glob(f"{prefix}*"):
        try:
            lock = os.open(leftover, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        except BlockingIOError:
            pass  # its writer is alive
        finally:
            os.close(lock)


def _sync(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in (*names, "."):
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _replace(temporary: Path, path: Path, prefix: str) -> None:
    """Rename over `path`. A directory that is not empty cannot be renamed over, so an older one steps aside
    first, as does that of another writer who comes in between.
    """
    older: list[Path] = []
    while True:
        aside = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
        try:
            os.rename(path, aside)
            older.append(aside)
        except FileNotFoundError:
            with suppress(FileNotFoundError):
                os.rmdir(aside)
        try:
            os.rename(temporary, path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if older:
                    os.rename(older.pop(), path)
                raise
    for directory in older:
        shutil.rmtree(directory, ignore_errors=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def hash_files(files: Mapping[str, Path], progress: Progress | None = None) -> dict[str, str]:
    """sha256, in hex, of every file, keyed as given. Files are read in parallel (hashing releases the GIL).
    """
    total = sum(path.stat().st_size for path in files.values())
    done, lock = 0, threading.Lock()

    def advance(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            if progress:
                progress(done, total)

    def one(path: Path) -> str:
        digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(memoryview(buffer)[:size])
                advance(size)
        return digest.hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(one, files.values()), strict=True))
