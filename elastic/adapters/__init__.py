"""A weight update as low-rank factors, one file per method."""

from elastic.adapters.base import Adapter
from elastic.adapters.lora import Lora

METHODS: dict[str, type[Adapter]] = {"lora": Lora}

__all__ = ["METHODS", "Adapter", "Lora"]
