"""Tools of the system that some tests need: found, or installed where CI=true, or the test says what to install."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

SBIN = "/usr/sbin:/sbin"


def needs(command: str, package: str) -> str:
    """The tool's path. Skips the test, naming the Debian package, where it is not there and cannot be installed."""
    path = f"{os.environ.get('PATH', os.defpath)}:{SBIN}"
    found = shutil.which(command, path=path)
    if found is None and os.environ.get("CI") == "true" and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for step in (["update"], ["install", "--yes", "--no-install-recommends", package]):
            subprocess.run(["apt-get", "-qq", *step], check=False, capture_output=True, env=environment)
        found = shutil.which(command, path=path)
    if found is None:
        pytest.skip(f"{command} is not installed: apt-get install {package}")
    return found
