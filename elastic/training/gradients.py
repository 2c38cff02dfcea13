"""Whether a loss reaches all that it is to train."""

from __future__ import annotations

import re
from collections.abc import Sequence

from elastic.console import say
from elastic.spaces.bound import SubAdapter
from elastic.supernet.supernet import Supernet

SHOWN = 8
"""Names in a line."""


def unreached(net: Supernet, visited: Sequence[SubAdapter]) -> list[str]:
    """Names of the adapted layers whose factors have no gradient but zero after these sub-adapters
    were visited, of blocks that ran."""
    gone = [net.space.left_out(sub) for sub in visited]
    found = []
    for site, adapter in net.adapters():
        trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
        ran = not all(site.startswith(blocks) for blocks in gone)
        if ran and trained and not any(p.grad is not None and p.grad.any() for p in trained):
            found.append(site)
    return found


def tell_unreached(net: Supernet, visited: Sequence[SubAdapter]) -> None:
    """A line about those, if there are any."""
    sites = unreached(net, visited)
    if not sites:
        return
    shapes = list(dict.fromkeys(re.sub(r"\.\d+", ".*", site) for site in sites))
    more = f" and {len(shapes) - SHOWN} more" if len(shapes) > SHOWN else ""
    say(
        f"In the first step the loss reached none of the factors of {len(sites)} adapted layers: "
        f"{', '.join(shapes[:SHOWN])}{more}. What they make changes nothing, is looked at alone as "
        "an index is, or they are experts that got no token. While that is so they stay as they "
        "start: layers that are never reached are better left out of adapt"
    )
