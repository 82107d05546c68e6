"""Folders of pictures: a folder for each class, pictures beside masks, or pictures alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from methods.training import Samples
from search.base import DataError
from search.workload.data.pictures import Preparation
from search.workload.data.samples import Masked, Pictures

log = logging.getLogger(__name__)

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""The endings of picture files, as torchvision's."""

TRAIN, HELD_OUT = ("train", "training"), ("test", "testing", "val", "valid", "validation", "eval")
"""The names of folders that hold a set, in lower case; of several held-out sets the first one is read."""


def image_folder(root: Path, prepare: Preparation) -> tuple[Samples, Samples | None]:
    """Pictures under `root/train/CLASS/` and `root/test/CLASS/`, or under `root/CLASS/` with no test set.

    The folders of the sets may have the other names of `TRAIN` and `HELD_OUT`, in either case.

    Raises:
        DataError: a class folder holds no picture, or the test set's classes are not the training set's.
    """
    sets = {name.lower(): root / name for name in _folders(root) if _folders(root / name)}
    train, held_out = _train_and_held_out(sets)
    if train is None:
        _refuse_sets(root)
        return _find_pictures(root, _classes(root), prepare), None
    classes = _classes(train)
    pictures = _find_pictures(train, classes, prepare)
    if unused := [place.name for place in sets.values() if place not in (train, held_out)]:
        log.warning("%s: %s is not read, beside %s", root, ", ".join(sorted(unused)), train.name)
    if held_out is None:
        return pictures, None
    if _classes(held_out) != classes:
        differing = ", ".join(sorted(_classes(held_out).keys() ^ classes.keys()))
        raise DataError(
            f"{held_out} and {train} have different classes ({differing}); expected the same sub-folders in both; "
            "complete them"
        )
    return pictures, _find_pictures(held_out, classes, prepare)


IMAGES, MASKS = ("images", "imgs", "pictures"), ("masks", "labels", "annotations")
"""The names of the two folders of a segmentation set, in lower case."""


def mask_folder(root: Path, prepare: Preparation) -> tuple[Samples, Samples | None]:
    """Pictures and masks of their names under `root/train/images` and `root/train/masks`, and under `root/test`.

    Without sets, `images` and `masks` lie in `root`. The folders may have the other names of `TRAIN`, `HELD_OUT`,
    `IMAGES` and `MASKS`, in either case.

    Raises:
        DataError: there are no such folders, or a picture or a mask is alone.
    """
    train, held_out = _train_and_held_out({name.lower(): root / name for name in _folders(root)})
    if train is None:
        return _find_masked(root, prepare), None
    return _find_masked(train, prepare), None if held_out is None else _find_masked(held_out, prepare)


def _find_masked(folder: Path, prepare: Preparation) -> Masked:
    places = {name.lower(): folder / name for name in _folders(folder)}
    images, masks = (next((places[name] for name in names if name in places), None) for names in (IMAGES, MASKS))
    if images is None or masks is None:
        raise DataError(
            f"{folder} has the folders {', '.join(sorted(places)) or 'none'}; expected images and masks, a mask for "
            "each picture by its name; correct data.root, or rename them"
        )
    pictures, known = _by_stem(images), _by_stem(masks)
    if alone := sorted(pictures.keys() ^ known.keys()):
        raise DataError(
            f"{alone[0]} has no {'mask' if alone[0] in pictures else 'picture'} in {folder}, and so have "
            f"{len(alone) - 1} others; expected one mask for each picture, of the same name but for the ending; add "
            "or remove them"
        )
    if not pictures:
        raise DataError(f"no pictures in {images}; expected some ({', '.join(ENDINGS)}); correct data.root")
    stems = sorted(pictures)
    return Masked(tuple(pictures[stem] for stem in stems), tuple(known[stem] for stem in stems), prepare)


def _by_stem(folder: Path) -> dict[str, str]:
    """The picture files in a folder and below it, by their paths in it without the ending.

    Raises:
        DataError: two differ by their endings alone.
    """
    found: dict[str, str] = {}
    for path in _pictures_below(folder):
        stem = str(Path(path).relative_to(folder).with_suffix(""))
        if stem in found:
            raise DataError(
                f"{found[stem]} and {path} differ by their endings alone; expected one file of a name; remove one"
            )
        found[stem] = path
    return found


def unlabelled_pictures(root: Path, prepare: Preparation) -> tuple[Samples, Samples | None]:
    """All pictures in a folder and below it, without labels; of one with sets, named as for `image_folder`, theirs.

    A folder `train` beside others that are no sets may be a class of vehicles.

    Raises:
        DataError: there is no picture.
    """
    folders = _folders(root)
    train, held_out = _train_and_held_out({name.lower(): root / name for name in folders})
    if train is None or not (held_out or len(folders) == 1 or _folders(train)):
        return _all_pictures(root, prepare), None
    return _all_pictures(train, prepare), None if held_out is None else _all_pictures(held_out, prepare)


def _all_pictures(folder: Path, prepare: Preparation) -> Pictures:
    """The pictures in a folder and then below it, in the order in which those of classes are found."""
    paths = _pictures_in(folder) if folder.is_dir() else []
    paths += [path for name in _folders(folder) for path in _pictures_below(folder / name)]
    if not paths:
        raise DataError(f"no pictures in {folder}; expected some ({', '.join(ENDINGS)}); correct data.root")
    return Pictures(tuple(paths), np.zeros(len(paths), np.int64), prepare)


def _train_and_held_out(sets: Mapping[str, Path]) -> tuple[Path | None, Path | None]:
    """The folder of the training set and that of the held-out set, among folders by their names in lower case."""
    train, held_out = (next((sets[name] for name in names if name in sets), None) for names in (TRAIN, HELD_OUT))
    return train, held_out


def _folders(folder: Path) -> list[str]:
    """The names of the sub-folders, in order, without those that programs leave behind."""
    found = sorted(place.name for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []
    return [name for name in found if not _is_hidden(name)]


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _refuse_sets(root: Path) -> None:
    """Refuse folders of sets in the place of classes: they hold the same sub-folders, and no picture of their own."""
    inside = {name: tuple(_folders(root / name)) for name in _folders(root)}
    named = [name for name in inside if name.lower() in TRAIN + HELD_OUT]
    named = [name for name in named if inside[name] or len(named) == len(inside)]
    alike = [name for name, below in inside.items() if len(below) > 1 and list(inside.values()).count(below) > 1]
    alike = [name for name in alike if not _pictures_in(root / name)]
    if sets := named or alike:
        is_flat = any(_pictures_in(root / name) for name in named if not inside[name])
        raise DataError(
            f"{root} holds {' and '.join(sets)}, which look like sets and not like classes; expected a folder train "
            "(or training) beside test, testing, val, valid or validation; rename them"
            + is_flat
            * ", or give data.labels: false if the pictures have no labels"
        )
    if len(inside) == 1 and (only := next(iter(inside))) and inside[only] and not any(_pictures_in(root / only)):
        raise DataError(
            f"{root} holds the one folder {only}, which holds {', '.join(inside[only][:4])} and no picture of its own; "
            f"expected one sub-folder of pictures per class; set data.root to {root / only}"
        )


def _classes(folder: Path) -> dict[str, int]:
    """Number the classes, which are the sub-folders in the order of their names."""
    names = _folders(folder)
    if not names and folder.is_dir() and (pictures := _pictures_in(folder)):
        raise DataError(
            f"{folder} holds {len(pictures):,} pictures and no folder of a class; expected one sub-folder of pictures "
            "per class; sort them, or give data.labels: false if they have no labels: then students are judged by how "
            "often they agree with the teacher"
        )
    if not names:
        raise DataError(f"no classes in {folder}; expected one sub-folder of pictures per class; correct data.root")
    if skipped := sorted(place.name for place in folder.iterdir() if place.is_dir() and _is_hidden(place.name)):
        log.warning("%s: %s is no class and is skipped", folder, ", ".join(skipped))
    return {name: number for number, name in enumerate(names)}


def _find_pictures(folder: Path, classes: dict[str, int], prepare: Preparation) -> Pictures:
    found = {name: list(_pictures_below(folder / name)) for name in classes}
    if empty := [name for name, paths in found.items() if not paths]:
        raise DataError(
            f"pictures are missing in {folder}: the classes {', '.join(empty)} have none; expected some in every "
            f"class ({', '.join(ENDINGS)}); add them or remove its folder"
        )
    labels = np.repeat(list(classes.values()), [len(paths) for paths in found.values()])
    return Pictures(tuple(path for paths in found.values() for path in paths), labels.astype(np.int64), prepare)


def _pictures_below(folder: Path) -> Iterator[str]:
    """Yield the pictures of a class in the order in which torchvision finds them, without hidden ones."""
    for place, _, _ in sorted(os.walk(folder, followlinks=True)):
        if not any(_is_hidden(part) for part in Path(place).relative_to(folder).parts):
            yield from _pictures_in(Path(place))


def _pictures_in(folder: Path) -> list[str]:
    names = (place.name for place in folder.iterdir() if place.name.lower().endswith(ENDINGS))
    return [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
