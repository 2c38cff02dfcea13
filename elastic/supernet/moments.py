"""Second moments of what enters the layers whose columns can be cut: what is known, of calibration
examples, about how channels follow one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from elastic.console import say, track
from elastic.data.collating import collated
from elastic.errors import RunError
from elastic.files import write_bytes
from elastic.models.modules import evaluating
from elastic.plain import one_line
from elastic.supernet.routed import channels, told, widths_of
from elastic.supernet.watching import Watching

if TYPE_CHECKING:
    from torch import nn

    from elastic.data.encoding import Encoded
    from elastic.supernet.supernet import Supernet

ROOM = 4e9
"""Bytes of moments that one pass over the calibration batches adds up."""


@torch.no_grad()
def second_moments(
    net: Supernet, batches: Sequence[dict[str, Tensor]], room: float = ROOM
) -> dict[str, Tensor]:
    """By layer whose columns can be cut, G = E[x xᵀ] over real tokens of its input x at full size,
    (in, in) float32, in the supernet's order of channels. By expert (its module and its place) the
    same of its channels, over the tokens that are sent to it, times their weights.

    `batches` are keyword arguments of the model. Layers are taken in as many passes as their
    moments need `room`. One that sees nothing, or what is not finite, is left out, and said.
    """
    watching, found, experts = Watching(net.model), {}, widths_of(net.space)
    idle: Counter[str] = Counter()
    with net.active(net.space.maximal()), evaluating(net.model):
        for sites in _rounds(net, room):
            sums = {site: torch.zeros(1) for site in sites}
            seen = dict.fromkeys(sites, 0)
            add = {site: partial(_add, sums, seen, site) for site in sites}
            layers = {site: add[site] for site in sites if site not in experts}
            routed: dict[str, set[int]] = {}
            for site in sites:
                if site in experts:
                    name, _, place = site.rpartition(".")
                    routed.setdefault(name, set()).add(int(place))
            tell = {
                name: partial(_add_routed, net.mixtures[name].experts, name, places, add)
                for name, places in routed.items()
            }
            with watching.inputs(layers), told(watching, tell):
                for batch in track(batches, "second moments"):
                    watching(batch)
            for site in sites:
                if seen[site] and torch.isfinite(sums[site]).all():
                    found[site] = sums[site] / seen[site]
                elif site in experts:
                    idle[site.rpartition(".")[0]] += 1
                else:
                    reason = "not finite" if seen[site] else "unknown"
                    say(f"{site} is not made up for when cut: its inputs are {reason}")
    for name, count in idle.items():
        say(f"{count} experts of {name} are not made up for when cut: no token is sent to them")
    return found


def calibrated(
    net: Supernet, examples: Sequence[Encoded], *, batch_size: int, pad: int
) -> dict[str, Tensor]:
    """Those of encoded training examples, as the model meets them: prompt and answer."""
    if not (net.space.reading or widths_of(net.space)) or not examples:
        return {}
    say(f"Calibrating what cut channels leave behind on {len(examples)} training examples")
    return second_moments(net, list(collated(examples, batch_size, pad, net.model.device)))


def _add(sums: dict[str, Tensor], seen: dict[str, int], site: str, x: Tensor) -> None:
    x = x.float()
    sums[site] = x.T @ x if not seen[site] else sums[site].addmm_(x.T, x)
    seen[site] += len(x)


def _add_routed(
    experts: nn.Module,
    name: str,
    places: set[int],
    add: Mapping[str, Callable[[Tensor], None]],
    *given: Tensor,
) -> None:
    for sent, held in channels(experts, *given):
        for place in set(sent.tolist()) & places:
            add[f"{name}.{place}"](held[sent == place])


def _rounds(net: Supernet, room: float) -> Iterator[list[str]]:
    """Sites that fit together."""
    sites: list[str] = []
    held = 0
    layers = {site: net.layer(site).base.in_features for site in net.space.reading}
    for site, width in (layers | widths_of(net.space)).items():
        size = 4 * width**2
        if sites and held + size > room:
            yield sites
            sites, held = [], 0
        sites.append(site)
        held += size
    if sites:
        yield sites


SCALE, CORRELATION = "scale", "correlation"


class Moments(Mapping[str, Tensor]):
    """Those that `save` wrote, read when asked for; RunError for a damaged file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.widths: dict[str, int] = {}
        """Of the inputs, by layer."""
        try:
            self._file = safe_open(file, "pt")
            names = self._file.keys()
            shapes = {name: self._file.get_slice(name).get_shape() for name in names}
        except SafetensorError as error:
            raise RunError(f"{file}: damaged: {one_line(error)}") from None
        for name, shape in shapes.items():
            site, _, what = name.rpartition(".")
            if what == SCALE:
                n = self.widths[site] = shape[0] if len(shape) == 1 else 0
                if not n or shapes.get(f"{site}.{CORRELATION}") != [n * (n - 1) // 2]:
                    raise RunError(f"{file}: damaged: no moments of {site}")

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.widths:
            raise KeyError(site)
        scale = self._file.get_tensor(f"{site}.{SCALE}")
        packed = self._file.get_tensor(f"{site}.{CORRELATION}")
        n = len(scale)
        found = torch.zeros(n, n)
        found[*torch.tril_indices(n, n, -1)] = packed.float()
        found += found.T.clone()
        found.fill_diagonal_(1)
        return found * (scale * scale[:, None])

    def __iter__(self) -> Iterator[str]:
        return iter(self.widths)

    def __len__(self) -> int:
        return len(self.widths)


def save(moments: Mapping[str, Tensor], file: Path) -> None:
    """Of each its root diagonal (in,) in float32 and the correlations below it in float16: a
    quarter of the matrices' size, rounded far below the ridge that every solution gets."""
    tensors = {}
    for site, moment in moments.items():
        scale = moment.diagonal().clamp(min=0).sqrt()
        safe = torch.where(scale > 0, scale, 1.0)
        below = torch.tril_indices(len(scale), len(scale), -1)
        tensors[f"{site}.{SCALE}"] = scale.cpu().contiguous()
        tensors[f"{site}.{CORRELATION}"] = (moment / safe / safe[:, None])[*below].half().cpu()
    write_bytes(file, serialised(tensors))
