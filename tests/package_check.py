"""Build sdist → wheel → a clean environment, and run the command line from it.

Run by `make package`, not by pytest: it installs the base dependencies anew, with their pinned versions.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"package_check: {' '.join(map(str, command))} exited {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        venv.create(folder / "env", with_pip=True)
        pip = folder / "env" / "bin" / "pip"
        torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
        run(pip, "install", "--quiet", torch, cwd=folder)
        run(pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel, cwd=folder)
        lilliput = folder / "env" / "bin" / "lilliput"
        assert "run" in run(lilliput, "--help", cwd=folder)
        assert "smollm2-135m-everywhere" in run(lilliput, "list", "recipes", cwd=folder)
        assert '"$defs"' in run(lilliput, "schema", cwd=folder)
        for kind, name in (("solvers", "gptq"), ("exporters", "onnx_int4"), ("runtimes", "litert_cpu")):
            assert name in run(lilliput, "list", kind, cwd=folder)
    print("package_check: sdist, wheel and a clean environment's command line: 6 checks passed")


if __name__ == "__main__":
    main()
