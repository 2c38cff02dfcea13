"""Where `ElasticModel.fit` keeps checkpoints and metrics, and what they are of."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic import distributed
from elastic.config import TrainConfig
from elastic.data.digest import of_tokens, of_value
from elastic.data.encoding import Encoded
from elastic.errors import RunError, TrainingError
from elastic.files import read_json, write_json
from elastic.plain import shaped
from elastic.run import Run, as_plain, differences
from elastic.supernet.supernet import Supernet

FILE = "fit.json"


def known_by(
    net: Supernet, base: str, config: TrainConfig, encoded: Sequence[Encoded]
) -> dict[str, Any]:
    """What a training is told by: its checkpoints serve no other."""
    order = {name: index.tolist() for name, index in net.order.items()}
    return {
        "settings": as_plain(config),
        "adapter": as_plain(net.adapter),
        "space": of_value(net.declared.as_dict()),
        "base": base,
        "order": of_value(order),
        "rows": of_tokens(encoded),
    }


@contextlib.contextmanager
def place(folder: Path | str | None, known: Mapping[str, Any]) -> Iterator[Run]:
    """Where training keeps what it keeps, for this process alone; nowhere for longer than it lasts,
    unless a folder is given, or training fails: its message names a file there. RunError for the
    folder of a training that is known by something else."""
    if folder is not None:
        run = Run(folder)
        with run.alone():
            file = run.path / FILE
            if file.is_file():
                before = shaped(read_json(file), dict, file)
                if others := [d.split()[0] for d in differences(dict(known), before)]:
                    raise RunError(
                        f"{folder}: the training that is kept here differs in "
                        f"{', '.join(others[:4])}; give another folder, or delete this one"
                    )
            elif distributed.is_main():
                write_json(file, dict(known))
            yield run
        return
    temporary = Path(tempfile.mkdtemp(prefix="elastic-"))
    try:
        yield Run(temporary)
    except TrainingError:
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)
