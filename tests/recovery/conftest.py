"""What held-out answers may say."""

from __future__ import annotations

import itertools

import pytest

from elastic.recovery import recover


@pytest.fixture
def rising_losses(monkeypatch):
    """Everything is worse than what was asked about before it."""
    losses = itertools.count(1)
    monkeypatch.setattr(recover, "mean_loss", lambda model, batches: float(next(losses)))
