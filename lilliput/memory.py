"""Memory that a stage is done with goes back to the system before the next one begins.

glibc's malloc keeps what is freed for later: after sampling from SmolLM2-135M some 400 MB, which would stand below the
peak of every stage after it. malloc_trim(3) gives it back; other C libraries have no such call, and keep less.
"""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Collect what nobody holds, and trim the C library's heap where it can be."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
