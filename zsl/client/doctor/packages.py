"""Check installed packages against the requirements in zsl's metadata, without importing them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import zsl
from zsl.client.doctor.check import Check, State, attempt

DISTRIBUTION = "zsl-split"  # on PyPI, `zsl` is another project
# Extras for users; the others are for work on zsl itself.
NEEDED_FOR = {
    "gguf": "models in .gguf files",
    "quantized": "4- and 8-bit layers",
    "serve": "zsl serve",
    "train": "zsl-train",
    "tensorboard": "report_to = tensorboard",
    "trl": "SFTTrainer",
}


def installation_checks() -> Iterator[Check]:
    """Check Python, zsl, each required package, and each package of an extra."""
    try:
        own = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield Check(
            "zsl", State.WARN, f"{zsl.__version__}, not installed as a package", "pip install -e . where it lies"
        )
        return
    yield attempt("python", lambda: _check_python(own["Requires-Python"] or ""))
    yield attempt("zsl", _check_zsl)
    requirements = [Requirement(text) for text in own.get_all("Requires-Dist") or ()]
    for requirement in requirements:
        if _is_wanted(requirement, None):
            yield _check(requirement, None)
    for extra in NEEDED_FOR:
        for requirement in requirements:
            if _is_wanted(requirement, extra) and not _is_wanted(requirement, None):
                yield _check(requirement, extra)


def _check_python(wanted: str) -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Check("python", State.FAIL, f"{found}, zsl needs {wanted}", "make an environment with a newer Python")
    return Check("python", State.OK, f"{found}, {sys.executable}")


def _check_zsl() -> Check:
    from zsl.wire.frames import MAJOR  # needs packages of its own

    return Check("zsl", State.OK, f"{zsl.__version__}, protocol {MAJOR}")


def _is_wanted(requirement: Requirement, extra: str | None) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""})


def _check(requirement: Requirement, extra: str | None) -> Check:
    name, wanted = requirement.name, f"{requirement.name}{requirement.specifier}"
    install = f"pip install '{wanted}'"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if extra is None:
            return Check(name, State.FAIL, "not installed", install)
        return Check(name, State.SKIP, f"not installed, needed for {NEEDED_FOR[extra]}", install)
    if not requirement.specifier.contains(version, prereleases=True):
        state = State.FAIL if extra is None else State.WARN
        return Check(name, state, f"{version}, zsl needs {requirement.specifier}", install)
    return Check(name, State.OK, version)
