"""Sizes of slices in the columns in which mistral.rs reads those of MatFormer models.

It knows a slice by its name, the widths of the MLPs of the layers that run, and the numbers of the
others (mistralrs-core/src/matformer.rs; matformer_configs/gemma3n.csv is such a file). Gemma 3n is
the one model that it slices by them: ours it does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from elastic.spaces.bound import SubAdapter

if TYPE_CHECKING:
    from elastic.supernet.supernet import Supernet

COLUMNS = (
    "name", "# Layers", "# Effective Params (B)", "MMLU PT accuracy", "FFN Hidden Dims",
    "Layers Skipped",
)  # fmt: skip


def rows(net: Supernet, slices: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]] | None:
    """By name of a slice what those columns say of it, of an index as `elastic.formats.slices` has
    it; None unless every layer has one MLP, whose width the space knows.

    The fourth one has to be there, is not read, and stays empty: nobody has asked MMLU.
    """
    found: dict[int, str] = {}
    stacks = set()
    for group in net.space:
        for cut in group.cuts if group.dim == "width" else ():
            if cut.axis == "in":
                place = re.match(r"(.+?)\.(\d+)\.", cut.site)
                if place is None or int(place[2]) in found:
                    return None
                stacks.add(place[1])
                found[int(place[2])] = group.name
    if len(stacks) != 1:
        return None
    stack = stacks.pop()
    layers = range(len(net.model.get_submodule(stack)))
    if set(found) != set(layers):
        return None
    told = {}
    for name, about in slices.items():
        sub = SubAdapter(tuple(about["sub_adapter"].items()))
        kept = net.space.kept(sub).get(stack, list(layers))
        skipped = [layer for layer in layers if layer not in kept]
        widths = [sub[found[layer]] for layer in kept]
        params = about["params"] / 1e9
        told[name] = [
            name, str(len(kept)), str(params), "", str(widths), str(skipped) if skipped else ""
        ]  # fmt: skip
    return told
