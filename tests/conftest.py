"""Configuration of all tests. Without torch, only those that need none are collected (`bin/test-without-torch`)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import hypothesis

HERE = Path(__file__).parent
# tests/test_without_torch.py holds that these need none.
WITHOUT_TORCH = [
    "test_access.py",
    "test_answers.py",
    "test_anticipation.py",
    "test_balancer.py",
    "test_checkpoints.py",
    "test_costs.py",
    "test_curve.py",
    "test_docs.py",
    "test_endpoints.py",
    "test_faults_without_torch.py",
    "test_faulty_link.py",
    "test_granted_limits.py",
    "test_history.py",
    "test_imports.py",
    "test_interrupts.py",
    "test_keygen.py",
    "test_leaks.py",
    "test_loading.py",
    "test_mutations.py",
    "test_no_pickle.py",
    "test_request_table.py",
    "test_router.py",
    "test_scheduler.py",
    "test_server.py",
    "test_sessions.py",
    "test_sharing.py",
    "test_tenants.py",
    "test_wire_frames.py",
    "test_without_torch.py",
]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Several processes share few cores: a thread that waits for its next part must not do so in a loop, as is OpenMP's way.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
hypothesis.settings.register_profile("zsl", deadline=None)  # time is for benchmarks
hypothesis.settings.load_profile("zsl")

if find_spec("torch"):
    pytest_plugins = ["support.served"]
else:
    collect_ignore = [str(file) for file in HERE.glob("test_*.py") if file.name not in WITHOUT_TORCH]
