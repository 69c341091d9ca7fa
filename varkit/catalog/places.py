"""Where the experiments lie that measure the catalogue's claims."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def experiments_folder() -> Path:
    """`experiments/` inside the package, as installed, or beside it, as in a checkout; it may be missing."""
    installed = PACKAGE / "experiments"
    return installed if installed.is_dir() else PACKAGE.parent / "experiments"
