"""Whether what is asked for can fit the memory there is."""

from __future__ import annotations

import os

import torch


def why_not_in_memory(what: str, needed: int, device: torch.device | None = None) -> str | None:
    """Why something cannot be done in the memory there is, used or not; None where it can.

    Args:
        what: the subject of the message, in the plural.
        needed: bytes, a lower bound.
        device: where; None: in this machine's memory.
    """
    if device is not None and device.type == "cuda":
        where, available = str(device), torch.cuda.get_device_properties(device).total_memory
    else:
        where = "this machine"
        try:
            available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None
    if needed <= available:
        return None
    return (
        f"{what} need at least {needed / 1e9:.3g} GB of memory, {where} has {available / 1e9:.3g}"
    )
