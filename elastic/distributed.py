"""One process or several (torchrun, accelerate launch): who goes first, and what all share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def sharding() -> str | None:
    """What shards the model over the processes, as `accelerate launch` was configured."""
    for variable, name in (("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP")):
        if os.environ.get(f"ACCELERATE_USE_{variable}", "false").lower() in ("true", "1"):
            return name
    return None


def shards_parameters() -> bool:
    """Whether no process has the trained parameters whole: FSDP, and DeepSpeed from ZeRO 3 on."""
    if sharding() != "DeepSpeed":
        return sharding() is not None
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "3"
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(file).is_zero3()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others do; all leave it together."""
    if count() == 1:
        yield
        return
    state = _state()
    with state.main_process_first():
        yield
    state.wait_for_everyone()


def shared(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, in every process."""
    if count() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    _state()
    made = [make() if is_main() else None]
    return broadcast_object_list(made)[0]


def _state() -> Any:
    from accelerate import PartialState

    return PartialState()
