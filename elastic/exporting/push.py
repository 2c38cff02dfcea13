"""What was written, as a repository of the Hugging Face hub.

The Hugging Face folder is the repository's root, with the file for llama.cpp beside it, so that
both load by its name alone; every other format is a folder there. A format that is alone is the
root. All of it is one commit: nobody ever loads half of it.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from textwrap import shorten

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from elastic.config import ExportConfig
from elastic.console import busy, say
from elastic.errors import ExportError, require
from elastic.exporting import card
from elastic.exporting.report import Report
from elastic.formats.shards import WEIGHTS

AT_ROOT = ("hf", "gguf")


def places(config: ExportConfig, formats: Iterable[str], base_model: str) -> dict[str, str]:
    """By format that goes up, where it lies in the repository: "" is the root, else "NAME/".

    A PEFT adapter names its base, and so does a folder of every size that refers to it. One that is
    a folder here is of no use elsewhere, and its place is nobody else's business: those stay.
    """
    naming = {"peft", "elastic"} if config.slices.base == "reference" else {"peft"}
    going = [kind for kind in formats if kind not in naming or card.is_hub_name(base_model)]
    alone = len(going) == 1
    return {kind: "" if alone or kind in AT_ROOT else f"{kind}/" for kind in going}


def placed(report: Report) -> dict[str, str]:
    """`places` of what was written."""
    return places(report.config, report.paths, str(report.origin["base_model"]))


def check(config: ExportConfig, base_model: str) -> None:
    """Make the repository that `push_to_hub` names, if it is not there, and be sure that this
    user's token may write to it. ExportError where it may not, before anything is computed."""
    name = config.push_to_hub
    if name is None:
        return
    require(
        bool(places(config, config.kinds, base_model)),
        f"push_to_hub {name}: what is written names its base model, and {base_model} is on this "
        "machine alone; add another format",
    )
    api = HfApi(token=True)
    try:
        api.create_repo(name, private=config.push_private, exist_ok=True)
        api.auth_check(name, write=True)
    except Exception as error:  # the hub client raises many kinds
        raise ExportError(f"push_to_hub {name}: {_reason(error)}") from None


def push(report: Report) -> Report:
    """The report of an export that lies in the repository, too; ExportError, with the commands that
    go on from there, if that does not get there."""
    name = str(report.config.push_to_hub)
    going = placed(report)
    for kind in report.paths.keys() - going.keys():
        say(f"{kind} stays here: it names its base model, which is on this machine alone")
    if not going:
        raise ExportError(f"push_to_hub {name}: nothing that was written is for the hub; see above")
    files = _files(report.directory, going)
    api = HfApi(token=True)
    url = f"{api.endpoint}/{name}"
    size = sum(file.stat().st_size for file in files.values())
    say(f"Pushing {len(files)} files, {size / 1e6:.0f} MB, to {url}")
    try:
        old = _taken_for_ours(api.list_repo_files(name), files)
        changes = [CommitOperationAdd(path, file) for path, file in files.items()]
        with busy(f"pushing to {name}", own_bars=True):
            api.create_commit(
                name, [*map(CommitOperationDelete, old), *changes],
                commit_message=f"{report.model.name}, written by elastic-adapters",
            )  # fmt: skip
    except Exception as error:  # as above
        raise ExportError(
            f"push_to_hub {name}: {_reason(error)}; what was written is whole, in "
            f"{report.directory}; this goes on: {_commands(name, report.directory, going)}"
        ) from None
    return dataclasses.replace(report, url=url)


def _files(directory: Path, going: Mapping[str, str]) -> dict[str, Path]:
    """What goes up, by its path in the repository. Not the reports: they say where things are."""
    found = {}
    for kind, place in going.items():
        folder = directory / kind
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                found[f"{place}{file.relative_to(folder).as_posix()}"] = file
    return found if "hf" in going else {**found, card.FILE: directory / card.FILE}


def _taken_for_ours(there: Iterable[str], files: Mapping[str, Path]) -> list[str]:
    """Weights that an earlier model has left where these are: in one file, say, where these are
    in two. Everything else stays."""
    folders = {PurePosixPath(path).parent for path in files}
    old = (PurePosixPath(path) for path in there if path not in files)
    return [str(p) for p in old if p.parent in folders and re.fullmatch(WEIGHTS, p.name)]


def _commands(name: str, directory: Path, going: Mapping[str, str]) -> str:
    """What uploads the same by hand."""
    pairs = [(directory / kind, place or ".") for kind, place in going.items()]
    if "hf" not in going:
        pairs.append((directory / card.FILE, card.FILE))
    return " && ".join(
        f"hf upload {name} {shlex.quote(str(here))} {place}" for here, place in pairs
    )


def _reason(error: Exception) -> str:
    """What the hub, or the way there, has against it."""
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token; run `hf auth login`, or set HF_TOKEN to one that may write"
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub client is offline; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub refuses the token (401); run `hf auth login --force`, or set HF_TOKEN anew"
    if status == 403:
        return (
            "the token may not write there (403); give an owner that it may write for, or a token "
            "that may (https://huggingface.co/settings/tokens)"
        )
    cause = error.__cause__
    told = f"{type(error).__name__}: {error}"
    told += f" {cause}" if cause and str(cause) not in told else ""
    return shorten(told, 300, placeholder=" ...")
