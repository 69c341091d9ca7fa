"""Open a dataset by its name or its path."""

from collections.abc import Callable
from pathlib import Path

from varkit.data.arrays import open_array
from varkit.data.base import Dataset
from varkit.data.folder import ImageFolder
from varkit.errors import unknown_name


def open_dataset(spec: str) -> Dataset:
    """Return the dataset called `spec`, or the one in the folder, `.npy` or `.npz` file at that path."""
    if spec in BUILT_IN:
        return BUILT_IN[spec]()
    path = Path(spec)
    if path.suffix.lower() in (".npy", ".npz") and not path.is_dir():
        return open_array(path)
    if path.exists() or len(path.parts) > 1:
        return ImageFolder(path)
    raise unknown_name("dataset", spec, BUILT_IN, "A folder of pictures and an .npy or .npz file work too.")


def _digits() -> Dataset:
    from varkit.data.real import Digits

    return Digits()


def _photographs() -> Dataset:
    from varkit.data.real import Photographs

    return Photographs()


def _emoji() -> Dataset:
    from varkit.data.emoji import Emoji

    return Emoji()


def _scenes() -> Dataset:
    from varkit.data.scene_set import SceneSet

    return SceneSet()


def _tidy_scenes() -> Dataset:
    from varkit.data.scene_set import SceneSet

    return SceneSet(tidy=True)


BUILT_IN: dict[str, Callable[[], Dataset]] = {
    "digits": _digits,
    "emoji": _emoji,
    "photographs": _photographs,
    "scenes": _scenes,
    "scenes-tidy": _tidy_scenes,
}
