"""Copy the tensors of a pass between host and device memory. A no-op on the CPU.

On an accelerator: pinned host buffers, copies on a separate stream, and one synchronization per pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Transfer:
    """Copies tensors between host and device. For the compute thread only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.Stream(device) if device.type != "cpu" else None

    def to_device(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy host tensors to the device. The current stream waits for the copies."""
        if self._copies is None:
            return list(tensors)
        compute = torch.accelerator.current_stream(self._device)
        moved = []
        with self._copies:
            for tensor in tensors:
                on_device = tensor.pin_memory().to(self._device, non_blocking=True)
                on_device.record_stream(compute)  # keep its memory until the pass has read it
                moved.append(on_device)
        compute.wait_stream(self._copies)
        return moved

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy device tensors to the host, and wait for the copies."""
        if self._copies is None:
            return list(tensors)
        self._copies.wait_stream(torch.accelerator.current_stream(self._device))
        moved = []
        with self._copies:
            for tensor in tensors:
                on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                on_host.copy_(tensor, non_blocking=True)
                moved.append(on_host)
        self._copies.synchronize()
        return moved
