"""No code of zsl runs what it is sent: nothing is unpickled, evaluated, or loaded by a loader that would.

The whole package is read, function-level imports too: what the daemon imports of it is a part of that.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "zsl"

MODULES = {"pickle", "cPickle", "_pickle", "pickletools", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
NAMES = {
    "eval", "exec", "compile", "__import__",
    "torch.load", "torch.serialization.load", "torch.jit.load", "torch.hub.load",
    "numpy.load", "numpy.lib.npyio.load", "numpy.lib.format.read_array", "pandas.read_pickle",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load",
}  # fmt: skip
ATTRIBUTES = {"recv_pyobj", "send_pyobj", "__reduce__", "__reduce_ex__"}
# A weight without memory says how a user's own pickle of a model makes it again; nothing of zsl unpickles it.
OF_THE_USER = {"split/ghosts.py": ["__reduce_ex__"]}
# What an argument of this name may be; None: nothing.
ARGUMENTS = {"allow_pickle": False, "weights_only": True, "ext_hook": None}


def forbidden(source: str) -> list[str]:
    """List the forbidden calls and imports of a source, with their lines."""
    tree = ast.parse(source)
    meanings = dict(_imported_names(tree))
    return sorted(f"{line}: {what}" for node in ast.walk(tree) for line, what in _found(node, meanings))


def _imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Map each imported name to its module: `np` to `numpy`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _found(node: ast.AST, meanings: dict[str, str]) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names if alias.name.partition(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom):
        yield from (
            (node.lineno, f"{node.module}.{alias.name}")
            for alias in node.names
            if (node.module or "").partition(".")[0] in MODULES or f"{node.module}.{alias.name}" in MODULES | NAMES
        )
    elif isinstance(node, ast.Name | ast.Attribute):
        name = _dotted(node, meanings)
        if name in NAMES or name.rpartition(".")[2] in ATTRIBUTES:
            yield node.lineno, name
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        if node.name in ATTRIBUTES:
            yield node.lineno, node.name
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            allowed = ARGUMENTS.get(keyword.arg or "")
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
            if keyword.arg in ARGUMENTS and value is not allowed:
                yield node.lineno, keyword.arg
        if _dotted(node.func, meanings).rpartition(".")[2] == "import_module":
            for argument in node.args:
                if isinstance(argument, ast.Constant) and str(argument.value).partition(".")[0] in MODULES:
                    yield node.lineno, f"import_module({argument.value!r})"


def _dotted(node: ast.AST, meanings: dict[str, str]) -> str:
    """`np.lib.load` is `numpy.lib.load`; what is in front of a name may be anything, then it is left out: `.load`."""
    if isinstance(node, ast.Name):
        return meanings.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, meanings)}.{node.attr}"
    return ""


def test_no_file_of_zsl_runs_what_it_is_sent() -> None:
    files = sorted(ROOT.rglob("*.py"))
    read = {"cli/trunkd.py", "trunk/daemon/server.py", "wire/frames.py"}
    assert read <= {str(file.relative_to(ROOT)) for file in files}
    found = {str(file.relative_to(ROOT)): forbidden(file.read_text()) for file in files}
    assert {name: [one.split(": ")[1] for one in what] for name, what in found.items() if what} == OF_THE_USER


BAD = [
    "import pickle",
    "import os, cPickle as p",
    "def late():\n    import dill",
    "from cloudpickle import loads",
    "import marshal",
    "import shelve",
    "from joblib import load",
    "import importlib\nimportlib.import_module('pickle')",
    "from importlib import import_module\nimport_module('dill.source')",
    "__import__(name)",
    "import torch\ntorch.load(file)",
    "import torch as t\nt.load(file, weights_only=True)",
    "from torch import load",
    "from torch import load as read\nread(file)",
    "import torch.serialization\ntorch.serialization.load(file)",
    "import numpy as np\nnp.load(file)",
    "from numpy import load",
    "read(file, allow_pickle=True)",
    "read(file, allow_pickle=trusted)",
    "read(file, weights_only=False)",
    "socket.recv_pyobj()",
    "self.socket().send_pyobj(x)",
    "eval(text)",
    "exec(text)",
    "compile(text, 'file', 'exec')",
    "run = eval",
    "import msgpack\nmsgpack.unpackb(data, ext_hook=decode)",
    "import yaml\nyaml.load(text)",
    "from yaml import unsafe_load",
    "class A:\n    def __reduce__(self):\n        return print, ()",
    "A.__reduce_ex__ = hook",
    "import pandas as pd\npd.read_pickle(file)",
]
GOOD = [
    "model.eval()",
    "import torch\ntorch.compile(model)",
    "import re\nre.compile(pattern)",
    "import json\njson.load(file)",
    "import yaml\nyaml.safe_load(text)",
    "from safetensors.torch import load, load_file",
    "import msgpack\nmsgpack.unpackb(data, object_pairs_hook=dict)",
    "read(file, weights_only=True, allow_pickle=False)",
    "class A:\n    def __getstate__(self):\n        return {}",
    "from importlib import import_module\nimport_module(name)",
    "'pickle, eval(x) and torch.load(f) in a text'",
]


@pytest.mark.parametrize("source", BAD)
def test_what_would_run_what_it_is_sent_is_found(source: str) -> None:
    assert forbidden(source)


@pytest.mark.parametrize("source", GOOD)
def test_what_looks_like_it_is_not(source: str) -> None:
    assert forbidden(source) == []
