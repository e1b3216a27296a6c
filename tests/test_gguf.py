"""A GGUF file is dequantized in a process of its own, which takes nothing from the folder that it is started in."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from zsl.errors import ModelError
from zsl.models import gguf


def test_the_process_that_dequantizes_takes_no_module_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("random.py", "zsl.py"):
        (tmp_path / name).write_text("import sys; sys.exit('taken from the working folder')")
    file = tmp_path / "model.gguf"
    file.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    assert "from zsl.models.gguf import convert; " in gguf._START
    to_be_found = gguf._START.replace("convert(*", "import random; sys.exit(random.__file__); (")
    monkeypatch.setattr(gguf, "_START", to_be_found)
    with pytest.raises(ModelError) as raised:
        gguf.dequantized_directory(file)
    assert str(raised.value).endswith(f"cannot be dequantized: {random.__file__}")
    assert [message for message in caplog.messages if message.startswith(f"dequantizing {file}")] == caplog.messages
    assert list((tmp_path / "cache" / "zsl" / "gguf").iterdir()) == []
