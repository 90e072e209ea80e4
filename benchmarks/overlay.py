"""Packages of other versions than ours, for peers that need them: a folder that goes before ours on Python's path.

pip installs the packages that are named, without their dependencies: what else they import is what is installed here.
So an overlay is small, and what a peer is made with differs from our environment by these packages alone.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.kept import keep

# The builder of onnxruntime-genai 0.18 imports classes that transformers 4.57 has not; that of 0.11.4 works with it.
GENAI = ("onnxruntime-genai==0.11.4",)
# litert-torch's generative export imports cache classes of transformers 5; the rest is what that needs beside ours.
TRANSFORMERS_5 = (
    "transformers==5.23.0", "huggingface_hub==2.4.0", "tokenizers==0.23.3", "httpx2==2.16.2", "httpcore2==2.16.2",
    "truststore==0.10.5",
)  # fmt: skip


def ensure(packages: tuple[str, ...], folder: Path) -> Path:
    """`folder` with the packages. Raises subprocess.CalledProcessError where pip cannot get them."""
    return keep(folder, pinned(packages), lambda partial: _install(packages, partial))


def pinned(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions by name."""
    return dict(package.split("==") for package in packages)


def _install(packages: tuple[str, ...], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    subprocess.run(command, check=True)
