"""Base weights kept in 8 or 4 bits, and dequantised one layer at a time whenever they are read.

bitsandbytes packs them, as transformers loads them; nothing is packed a second time. An order of
channels stands beside the codes and is applied to the dequantised weight, so every width is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BLOCK = 64
"""Weights that share one scale in nf4."""


def _int8(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(codes, scales).to(dtype)


def _nf4(codes: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    known = torch.float32 if dtype == torch.float64 else dtype
    state = QuantState(scales, shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=known)
    return dequantize_4bit(codes, state).to(dtype)


DEQUANTISE = {"int8": _int8, "nf4": _nf4}


def packed_bytes(kind: str, out_features: int, in_features: int) -> int:
    """Codes and float32 scales of a weight: one scale per row (int8) or per block (nf4)."""
    weights = out_features * in_features
    if kind == "int8":
        return weights + 4 * out_features
    return -(-weights // 2) + 4 * -(-weights // BLOCK)


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight exists only while somebody uses it.

    `weight` is a dense (out_features, in_features) tensor in the type to compute in, formed anew
    at every access; so does the backward pass, which keeps none.

    Shapes: int8 codes (out, in), scales (out,); nf4 codes (out * in / 2, 1), two to a byte, scales
    (out * in / 64,); rows (out,) and columns (in,) once channels are reordered.
    """

    codes: Tensor
    scales: Tensor
    rows: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        kind: str,
        codes: Tensor,
        scales: Tensor,
        bias: nn.Parameter | None,
        *,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = self.shape = shape
        self.kind, self.dtype = kind, dtype
        self.register_parameter("bias", bias)
        tensors = {"codes": codes, "scales": scales, "rows": None, "columns": None}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @property
    def weight(self) -> Tensor:  # type: ignore[override] # read alone, never a parameter
        weight = DEQUANTISE[self.kind](self.codes, self.scales, self.shape, self.dtype)
        if self.rows is not None:
            weight = weight.index_select(0, self.rows)
        if self.columns is not None:
            weight = weight.index_select(1, self.columns)
        return weight

    def reorder(self, axis: str, index: Tensor) -> None:
        """Put channel index[i] at place i of the output ("out", with the bias) or the input."""
        name = "rows" if axis == "out" else "columns"
        before, index = getattr(self, name), index.to(self.codes.device)
        setattr(self, name, index if before is None else before[index])
        if axis == "out" and self.bias is not None:
            self.bias.data.copy_(self.bias.data[index])

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, lambda: self.weight, self.bias)


def frozen_linear(x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias for frozen W and bias; W is asked for in either pass and never kept."""
    return _FrozenLinear.apply(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Under autocast the gradient has the type that the product was computed in.
        return grad @ ctx.weight().to(grad.dtype), None, None


def loading(
    kind: str, stored: torch.dtype | None, device: torch.device, whole: Sequence[str] = ()
) -> dict[str, Any]:
    """What `from_pretrained` needs to pack weights of the type `stored` as it reads them.

    They are packed as stored, not as computed with: a run trained in bfloat16 and exported in
    float32 has the same codes. Modules that are to stay `whole` are not packed; without any it is
    the head, as the library has it.
    """
    from transformers import BitsAndBytesConfig

    half = stored in (torch.float16, torch.bfloat16)
    return {
        "dtype": stored if half else torch.float32,
        "device_map": {"": str(device)},
        "quantization_config": BitsAndBytesConfig(
            load_in_8bit=kind == "int8",
            load_in_4bit=kind == "nf4",
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=list(whole) or None,
        ),
    }


@torch.no_grad()
def adopt_(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Put our layers around the tensors of a model just loaded, the rest in `dtype`, in place.

    The library's own layers would round activations to 8 bits, repack weights in their forward
    pass and refuse to be trained, saved and moved as any other model is.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, layer in list(model.named_modules()):
        weight: Any = getattr(layer, "weight", None)
        if isinstance(layer, Linear4bit):
            kind, scales = "nf4", weight.quant_state.absmax
        elif isinstance(layer, Linear8bitLt):
            kind, scales = "int8", weight.SCB
        else:
            continue
        codes = weight.data.as_subclass(Tensor)
        shape = torch.Size((layer.out_features, layer.in_features))
        own = QuantisedLinear(kind, codes, scales, layer.bias, shape=shape, dtype=dtype)
        model.set_submodule(name, own)
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    # Too sensitive for narrower types, says the model's class: transformers does the same.
    wide = set(model._keep_in_fp32_modules_strict)
    wide |= set(model._keep_in_fp32_modules if dtype == torch.float16 else ())
    for name, parameter in model.named_parameters():
        if wide.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model
