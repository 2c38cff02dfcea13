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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from elastic.errors import ConfigError, RunError, unknown

_PACKAGE = Path(__file__).parent


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


def read_json(path: Path | str) -> Any:
    """The JSON in `path`; RunError names the file when it is absent or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise RunError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None


def digest(path: Path | str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            total.update(chunk)
    return total.hexdigest()


@contextlib.contextmanager
def new_directory(path: Path | str) -> Iterator[Path]:
    """A directory to fill; it takes the place of `path` only when the block ends well.

    An earlier `path` stays as it is until then, and for good when the block raises.
    """
    path = Path(path)
    with named_failure(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield building
            _make_shareable(building)
            _replace_directory(building, path)
        finally:
            shutil.rmtree(building, ignore_errors=True)


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
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    os.rename(path, aside / "old")
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside / "old", path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into an error that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _code(error)
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise RunError(
                f"{path}: cannot be written ({os.strerror(code)}); "
                "what was there before is unchanged"
            ) from error
        raise


def _code(error: Exception) -> int | None:
    """The system's error number; safetensors puts it into the text of an error of its own."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def shipped(folder: str, name: str) -> Path:
    """The file that `name` means: a path, or the name of a file shipped in `folder`.

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
