"""Between the host's memory and the device's. On the CPU it is the same memory, and nothing is copied.

On an accelerator: page-locked host buffers, copies on a stream of their own, and one wait for a whole pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Transfer:
    """Moves the tensors of a pass. For the one thread that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.Stream(device) if device.type != "cpu" else None

    def to_device(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of the host, on the device, ready for what is computed next."""
        if self._copies is None:
            return list(tensors)
        compute = torch.accelerator.current_stream(self._device)
        moved = []
        with self._copies:
            for tensor in tensors:
                there = tensor.pin_memory().to(self._device, non_blocking=True)
                there.record_stream(compute)  # its memory is not reused before the pass has read it
                moved.append(there)
        compute.wait_stream(self._copies)
        return moved

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of the device, on the host, complete."""
        if self._copies is None:
            return list(tensors)
        self._copies.wait_stream(torch.accelerator.current_stream(self._device))
        moved = []
        with self._copies:
            for tensor in tensors:
                here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                here.copy_(tensor, non_blocking=True)
                moved.append(here)
        self._copies.synchronize()
        return moved
