"""`python -m benchmarks --out FOLDER`: our files beside the peers', on the same runtimes (benchmarks/runtimes.py)."""

import sys

from benchmarks.runtimes import main

if __name__ == "__main__":
    sys.exit(main())
