"""Operations, as torch counts them."""

from __future__ import annotations

from functools import partial

from torch.utils.flop_counter import FlopCounterMode

from elastic.models.meter import FLOPS


def formula(*arguments, out_val, operator, **settings) -> int:
    return FLOPS[operator](*arguments, out_val=out_val, **settings)


class Flops(FlopCounterMode):
    """torch's counter, with what it lacks for the CPU's attention."""

    def __init__(self) -> None:
        attention = {op: partial(formula, operator=op) for op in FLOPS if "for_cpu" in str(op)}
        for count in attention.values():
            count._get_raw = True  # as torch marks a formula that wants tensors, not shapes
        super().__init__(display=False, custom_mapping=attention)
