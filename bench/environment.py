"""Where a measurement is taken: the device and its state, the versions, the commit."""

import re
import subprocess
from dataclasses import dataclass
from typing import Any

import torch

from visattn import provenance
from visattn.device import describe


@dataclass(frozen=True)
class State:
    """A GPU's clock (MHz), power (W) and temperature (°C), at a moment; None where there is no GPU, or it does not tell."""

    clock: float | None = None
    power: float | None = None
    temperature: float | None = None


def environment(device: torch.device) -> dict[str, Any]:
    """What does not change while a suite runs."""
    found: dict[str, Any] = {"device": describe(device), "commit": provenance.commit()}
    found |= provenance.versions("torch", "triton", "visattn")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "driver": _nvidia_smi("driver_version"),
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "max_clock": max_clock(device),
            "power_limit": _number(_nvidia_smi("power.limit")),
        }
    return found


def state(device: torch.device) -> State:
    """The GPU's state right now, which is to be asked right after work and not in the middle of it.

    Of the driver's library, where Python has it: to start nvidia-smi takes longer than a timing.
    """
    if device.type != "cuda":
        return State()
    try:
        return State(torch.cuda.clock_rate(device), torch.cuda.power_draw(device) / 1000, torch.cuda.temperature(device))
    except Exception:  # of kinds that belong to a library which may not be there
        told = _nvidia_smi("clocks.sm,power.draw,temperature.gpu")
    values = [_number(part) for part in told.split(",")] if told else []
    return State(*values) if len(values) == 3 else State()


def max_clock(device: torch.device) -> float | None:
    """The highest clock of a GPU's multiprocessors, MHz; None where nobody tells."""
    return _number(_nvidia_smi("clocks.max.sm")) if device.type == "cuda" else None


def slug(device: str) -> str:
    """A device's name as a folder's: "NVIDIA H200" to "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _nvidia_smi(query: str) -> str | None:
    command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
