"""Settings of a short and silent training by a Trainer of transformers or TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def silent_settings(directory: Path, steps: int) -> dict[str, Any]:
    """Log each step, save and report nothing, and compute in single precision on the CPU."""
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
