"""Writing that is never seen half done: beside the target first, then renamed over it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from elastic.errors import ConfigError, RunError, unknown
from elastic.plain import parse_json, read_text

_PACKAGE = Path(__file__).parent
BUILDING, ASIDE = ".elastic-building", ".elastic-aside"
"""How hidden directories end in which something is being made, or that hold what it replaces."""


def write_text(path: Path | str, text: str) -> Path:
    """Replace `path` with `text` in one step; on any failure the old content is still there."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path | str, content: bytes) -> Path:
    """Replace `path` with `content` in one step."""
    path = Path(path)
    with named_failure(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent)
        with _held_directory(path, BUILDING) as building:
            new = building / path.name
            with new.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    return path


def write_json(path: Path | str, value: Any) -> Path:
    """`value` as indented JSON; NaN is refused, since other readers cannot read it."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path | str, rows: Iterable[Any]) -> Path:
    """One JSON value per line; NaN is refused."""
    return write_text(path, "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows))


def read_json(path: Path | str) -> Any:
    """The JSON in `path`; RunError names the file when it is absent or broken."""
    return parse_json(read_text(path), path)


def digest(path: Path | str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_file(existing: Path, path: Path) -> None:
    """The file under another name, or its copy where a file has one name alone."""
    try:
        os.link(existing, path)
    except OSError:
        shutil.copyfile(existing, path)


def tag(text: str) -> str:
    """A dozen letters for a text that is too long to be part of a name."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def new_directory(path: Path | str) -> Iterator[Path]:
    """A directory to fill; it takes the place of `path` only when the block ends well.

    An earlier `path` stays as it is until then, and for good when the block raises. What processes
    that were killed left in the middle of such a block, in the same folder, is cleared away first.
    """
    path = Path(path)
    with named_failure(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent)
        with _held_directory(path, BUILDING) as building:
            yield building
            _make_shareable(building)
            _replace_directory(building, path)


def is_leftover(path: Path) -> bool:
    """Whether writing makes such names for as long as it lasts."""
    return path.name.startswith(".") and path.name.endswith((BUILDING, ASIDE))


def clear_leftovers(folder: Path) -> None:
    """Remove what was being written when its process was killed; a directory that had been moved
    aside for a new one that never came goes back to its place."""
    for left in filter(is_leftover, list(folder.iterdir()) if folder.is_dir() else []):
        with lock(left) as alone:
            if not alone:
                continue
            for old in left.iterdir() if left.name.endswith(ASIDE) else ():
                if not (folder / old.name).exists():
                    os.rename(old, folder / old.name)
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A directory in `folder` while the block lasts; what killed processes left of theirs goes."""
    with named_failure(folder):
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        with _held_directory(folder / "scratch", BUILDING) as held:
            yield held


@contextlib.contextmanager
def _held_directory(path: Path, ending: str) -> Iterator[Path]:
    """A hidden directory beside `path`, locked while the block lasts and removed after it."""
    while True:
        held = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=ending))
        with lock(held, wait=True):
            if not held.exists():  # cleared away as a leftover in the moment before it was locked
                continue
            try:
                yield held
            finally:
                shutil.rmtree(held, ignore_errors=True)
            return


@contextlib.contextmanager
def lock(
    path: Path,
    *,
    wait: bool = False,
    say: Callable[[str], None] | None = None,
    after: float = 0.0,
) -> Iterator[bool]:
    """Whether this process alone has the directory or file, while the block lasts; to `wait` until
    it has, and to `say` whose end is waited for if that takes longer than `after` seconds.

    A lock ends with its process. Where nothing can be locked nobody ever has it alone."""
    alone = False
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            while not alone:
                # A network's locks want files that may be written.
                descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
                stack.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        raise
                    with _told_after(after, say, path):
                        fcntl.flock(descriptor, fcntl.LOCK_EX)
                # What was waited for may have been replaced or removed meanwhile.
                alone = os.path.samestat(os.fstat(descriptor), os.stat(path))
        yield alone


@contextlib.contextmanager
def _told_after(seconds: float, say: Callable[[str], None] | None, path: Path) -> Iterator[None]:
    """Say whom the block waits for, if it takes longer."""
    timer = threading.Timer(seconds, lambda: say(holder(path)) if say else None)
    timer.daemon = True
    if seconds:
        timer.start()
    else:
        timer.run()
    try:
        yield
    finally:
        timer.cancel()


def holder(path: Path) -> str:
    """Who has locked it, where the system says so."""
    with contextlib.suppress(OSError, ValueError):
        inode = os.stat(path).st_ino
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            _, kind, _, _, process, file, *_ = line.split()
            if kind == "FLOCK" and file.endswith(f":{inode}"):
                return f"process {process}"
    return "another process"


def _make_shareable(target: Path) -> None:
    """Modes as the user's umask would have made them: temporary files begin private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (target, *target.rglob("*")):
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)


def _replace_directory(new: Path, path: Path) -> None:
    try:
        os.rename(new, path)
        return
    except OSError:
        if not path.exists():
            raise
    with _held_directory(path, ASIDE) as aside:
        with contextlib.suppress(FileNotFoundError):  # by another, who is about to put its own
            os.rename(path, aside / path.name)
        try:
            _replace_directory(new, path)
        except BaseException:
            if (aside / path.name).exists() and not path.exists():
                os.rename(aside / path.name, path)
            raise


@contextlib.contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into a RunError that names the file."""
    try:
        yield
    except Exception as error:  # tokenizers raises no narrower one
        code = _code(error)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise RunError(
                f"{path}: cannot be written ({os.strerror(code)}); "
                "what was there before is unchanged"
            ) from error
        raise


def _code(error: Exception) -> int | None:
    """The system's error number, which safetensors and tokenizers have in the text alone. numpy and
    torch say only that less was written than asked, which is what a full disk does."""
    if re.search(
        r"^\d+ requested and \d+ written$|unexpected pos \d+ vs \d+|PytorchStreamWriter failed",
        str(error),
    ):
        return errno.ENOSPC
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def shipped_folders(folder: str) -> list[Path]:
    """Where `folder`, which comes with the package, lies: in a wheel inside the package, in a
    checkout beside it."""
    return [home / folder for home in (_PACKAGE, _PACKAGE.parent) if (home / folder).is_dir()]


def shipped(folder: str, name: str) -> Path:
    """The file that `name` means: a path, or the name of a file shipped in `folder`; ConfigError if
    it is neither."""
    if Path(name).suffix in (".yaml", ".yml", ".json") or os.sep in name:
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"{name}: no such file")
    files = {path.stem: path for home in shipped_folders(folder) for path in home.glob("*.yaml")}
    if name not in files:
        kind = folder.rstrip("s").replace("_", " ")
        raise ConfigError(unknown(kind, name, files) + "; or give a path to a .yaml file")
    return files[name]
