"""What `make setup` finds, as a test wants it: a cache of its own, nothing asked for, programs that only pretend."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest


def alone(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """The cache, in `folder`; no flags of whoever runs the tests."""
    patch.setenv("APPLIANCE_CACHE", str(folder / "cache"))
    for name in ("CMAKE_ARGS", "TORCH_INDEX", "BACKEND"):
        patch.delenv(name, raising=False)
    return folder / "cache"


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def source_distribution(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
