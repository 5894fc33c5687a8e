"""`python train.py ...` is `lorica train ...`, from a clone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from lorica.cli import main

if __name__ == "__main__":
    main("train")
