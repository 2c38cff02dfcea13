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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from elastic.errors import ConfigError, RunError, unknown
from elastic.plain import parse_json, read_text

_PACKAGE = Path(__file__).parent
BUILDING, ASIDE = ".elastic-building", ".elastic-aside"
"""How hidden directories end that are being filled, or hold what is being replaced."""


def write_text(path: Path | str, text: str) -> Path:
    """Replace `path` with `text` in one step; on any failure the old content is still there."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path | str, content: bytes) -> Path:
    """Replace `path` with `content` in one step."""
    path = Path(path)
    with named_failure(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _make_shareable(Path(name))
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
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


def clear_leftovers(folder: Path) -> None:
    """Remove what `new_directory` was at when its process was killed; a directory that it had moved
    aside for a new one that never came goes back to its place."""
    for left in [*folder.glob(f".*{BUILDING}"), *folder.glob(f".*{ASIDE}")]:
        with lock(left) as alone:
            if not alone:
                continue
            for old in left.iterdir() if left.name.endswith(ASIDE) else ():
                if not (folder / old.name).exists():
                    os.rename(old, folder / old.name)
            shutil.rmtree(left, ignore_errors=True)


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
def lock(directory: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone has the directory, while the block lasts; to `wait` until it has.
    A lock ends with its process. Where directories cannot be locked nobody ever has one alone."""
    alone = False
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            alone = True
        yield alone


def _make_shareable(target: Path) -> None:
    """Modes as the user's umask would have made them: temporary files begin private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (target, *target.rglob("*")):
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~mask)


def _replace_directory(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    with _held_directory(path, ASIDE) as aside:
        os.rename(path, aside / path.name)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(aside / path.name, path)
            raise


@contextlib.contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into a RunError that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _code(error)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise RunError(
                f"{path}: cannot be written ({os.strerror(code)}); "
                "what was there before is unchanged"
            ) from error
        raise


def _code(error: Exception) -> int | None:
    """The system's error number; safetensors puts it into the text of an error of its own. numpy
    says only that less was written than asked, which is what a full disk does."""
    if re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        return errno.ENOSPC
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def shipped(folder: str, name: str) -> Path:
    """The file that `name` means: a path, or the name of a file shipped in `folder`; ConfigError if
    it is neither.

    In a wheel the folder lies inside the package, in a checkout beside it.
    """
    if Path(name).suffix in (".yaml", ".yml", ".json") or os.sep in name:
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"{name}: no such file")
    homes = [home / folder for home in (_PACKAGE, _PACKAGE.parent) if (home / folder).is_dir()]
    files = {path.stem: path for home in homes for path in home.glob("*.yaml")}
    if name not in files:
        kind = folder.rstrip("s").replace("_", " ")
        raise ConfigError(unknown(kind, name, files) + "; or give a path to a .yaml file")
    return files[name]
