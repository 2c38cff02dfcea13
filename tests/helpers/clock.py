"""A machine whose clock only work moves forward, and runners on it."""

from __future__ import annotations

import numpy as np


class Machine:
    """A clock that only work moves forward."""

    def __init__(self):
        self.now = 0.0
        self.turns = 0
        self.log = []

    def clock(self) -> float:
        return self.now


class FakeRunner:
    """With threads of its own. Takes `prefill` and `decode` seconds, both times what `slowdown`
    says of the turn, counted over this runner's own turns (0 is the warm-up) and over everybody's.
    The first prefill of a turn takes long, and is not to be counted."""

    own_threads = True

    def __init__(self, machine, name, prefill, decode, slowdown=lambda own, all: 1.0):
        self.machine, self.name, self.slowdown = machine, name, slowdown
        self.seconds = {"prefill": prefill, "decode": decode}
        self.turns = 0
        self.warming = False
        self.prompts, self.tokens = [], []

    def prefill(self, input_ids):
        self.warming = not self.warming
        if self.warming:
            self.machine.now += 7.0
            return
        self.factor = self.slowdown(self.turns, self.machine.turns)
        self.turns += 1
        self.machine.turns += 1
        self.machine.log.append(self.name)
        self.prompts.append(input_ids.copy())
        self.machine.now += self.factor * self.seconds["prefill"]

    def decode(self, input_ids):
        self.tokens.append(input_ids.copy())
        self.machine.now += self.factor * self.seconds["decode"]


def drive(runner, ids: np.ndarray, prompt: int) -> np.ndarray:
    """Logits (batch, steps, vocab) behind ids[:, prompt - 1:], token by token after the prompt."""
    steps = [runner.prefill(ids[:, :prompt])]
    # A runner may write every step into the same memory.
    steps += [runner.decode(ids[:, i : i + 1]).copy() for i in range(prompt, ids.shape[1])]
    return np.stack(steps, axis=1)
