"""Runs the command: what is there, what is missing, whether it fits, and one file after the other."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...checkpoints.faults import printable
from ...errors import coded_error
from ..doctor.surroundings import space_of
from ..progress import ProgressDisplay
from .hub import ConnectionLost, Hub, Remote
from .options import models_folder, published_files, wanted_files
from .transfer import bytes_there, fetch_file, sha256_of

CONTINUES = "interrupted; the same command continues"
MARGIN = 10**8  # bytes that stay free


@dataclass(frozen=True)
class Item:
    """A file that is asked for, and its place."""

    remote: Remote
    target: Path

    @property
    def there(self) -> bool:
        return self.target.exists()

    @property
    def begun(self) -> int:
        return bytes_there(self.target, self.remote)

    @property
    def missing(self) -> int:
        return 0 if self.there else self.remote.size - self.begun


def run(arguments: Namespace, progress: ProgressDisplay) -> int:
    """Returns the exit status."""
    if arguments.list:
        progress.end()
        _print_list()
        return 0
    try:
        return _download(arguments, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(CONTINUES) from None


def _print_list() -> None:
    for name, files in published_files().items():
        print(name, *(f"  {file.folder}/{file.name}" for file in files), sep="\n")


def _download(arguments: Namespace, progress: ProgressDisplay) -> int:
    hub, folder = Hub(arguments.hub), models_folder(arguments)
    files = wanted_files(arguments.names)
    progress.begin("looking", len(files), unit="file")
    items = []
    for file in files:
        items.append(Item(_described(hub, file), folder / file.folder / file.name))
        progress.advance(1)
    progress.end()
    if arguments.dry_run:
        _print_table(items, folder)
        return 0
    for item in items:
        if item.there:
            _require_same(item, arguments.verify, progress)
    _require_room(items)
    for item in items:
        _get(hub, item, progress)
    progress.end()
    count = "1 file is" if len(items) == 1 else f"{len(items)} files are"
    print(f"{count} in {printable(str(folder))}; press R in ComfyUI")
    return 0


def _described(hub: Hub, file) -> Remote:
    try:
        return hub.describe(file)
    except ConnectionLost as lost:
        raise lost.args[0] from None


def _print_table(items: Iterable[Item], folder: Path) -> None:
    for item in items:
        size, begun = item.remote.size, item.begun
        state = "complete" if item.there else f"{100 * begun // size} % complete" if begun else "missing"
        print(f"{size / 1e9:8.2f} GB  {state:<10}  {item.remote.file.folder}/{item.target.name}")
    missing = sum(item.missing for item in items)
    free = space_of(folder).free
    print(f"{missing / 1e9:8.2f} GB to download; {free / 1e9:.1f} GB are free on the disk of {printable(str(folder))}")


def _require_same(item: Item, verify: bool, progress: ProgressDisplay) -> None:
    """Raises ValueError if the file at the place of a published one is another."""
    size = item.target.stat().st_size
    wrong = f"{size} bytes instead of {item.remote.size}" if size != item.remote.size else ""
    if not wrong and verify:
        progress.begin(f"checking {item.target.name}", size, unit="B")
        digest = sha256_of(item.target, progress.advance)
        progress.end()
        wrong = f"the SHA-256 {digest} instead of {item.remote.sha256}" if digest != item.remote.sha256 else ""
    if wrong:
        raise coded_error("AV-1804", f"{item.target} exists, but is not the published file: it has {wrong}. Rename "
                                     "or delete it, and run the command again.")  # fmt: skip
    progress.say(f"{item.target.name} exists already")


def _require_room(items: Iterable[Item]) -> None:
    """Raises ValueError if a disk has too little space for what is missing."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for item in items:
        place = next(one for one in item.target.parents if one.is_dir())
        device = os.stat(place).st_dev
        needed[device] = needed.get(device, 0) + item.missing
        places.setdefault(device, place)
    for device, count in needed.items():
        free = space_of(places[device]).free
        if count and count + MARGIN > free:
            raise coded_error("AV-1316", f"The disk of {places[device]} has {free / 1e9:.1f} GB free; the files that "
                                         f"are missing take {count / 1e9:.1f} GB. Make room, or give another place "
                                         "by --models.")  # fmt: skip


def _get(hub: Hub, item: Item, progress: ProgressDisplay) -> None:
    if item.there:
        return
    item.target.parent.mkdir(parents=True, exist_ok=True)
    progress.begin(item.target.name, item.remote.size, done=item.begun, unit="B")
    fetch_file(hub, item.remote, item.target, progress.step)
    progress.end()
    progress.say(f"{item.target.name}: {item.remote.size / 1e9:.2f} GB, its SHA-256 is correct")
