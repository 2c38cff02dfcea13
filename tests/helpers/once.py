"""What many tests would find out again."""

from __future__ import annotations

from types import ModuleType

import pytest

from elastic import run
from elastic.config import TrainConfig


def fitting_once(patch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Let these modules try once of each model and space whether they fit: it takes a third of a
    tiny training, and most tests train the same. What does not fit is refused every time."""
    fitting = set()

    def once(require_fits):
        def asked(model, space, rank) -> None:
            settings = model.config.to_json_string(use_diff=False)
            key = (type(model), settings, repr(space.as_dict()), rank)
            if key not in fitting:
                require_fits(model, space, rank)
                fitting.add(key)

        return asked

    for module in modules:
        patch.setattr(module, "require_fits", once(module.require_fits))


def reading_once(patch: pytest.MonkeyPatch) -> None:
    """Let the settings of a run and of all its copies be checked once: their text is the same, and
    it takes a tenth of a tiny training."""
    known, read = {}, run._settings

    def settings(text: str, where: str) -> TrainConfig:
        if text not in known:
            known[text] = read(text, where)
        return known[text]

    patch.setattr(run, "_settings", settings)
