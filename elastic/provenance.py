"""Where numbers come from: versions and hardware, for everything that is written."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("elastic-adapters", "torch", "transformers", "optuna", "bitsandbytes")


def provenance(device: str) -> dict[str, Any]:
    """Versions, device and date: what a figure depends on beside its configuration."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name(device)
    else:
        device = f"{device} ({_processor()}, {torch.get_num_threads()} threads)"
    return {"versions": {"python": platform.python_version(), **versions}, "device": device}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
