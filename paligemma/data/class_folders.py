"""A folder for each class, with its pictures -> rows: the prompt is the same in all, the answer the folder's name.

flowers/daisy/1.jpg  flowers/daisy/2.jpg  flowers/rose/1.jpg         answer en what is this? -> daisy
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paligemma.data.records import LABEL_PROMPT
from paligemma.data.rows import Row, Rows
from paligemma.files import is_junk


def pictures(files: Sequence[Path], language: str, whole_folder: bool) -> Rows:
    """whole_folder: the files are all pictures of the folder of classes, whose other files are counted in the note."""
    classes, folder = {file.parent.name for file in files}, files[0].parent.parent
    note = f"{folder}: folders of {len(classes):,} classes, {len(files):,} rows"
    left_out = files_below(folder) - len(files) if whole_folder else 0
    note += f" ({left_out:,} files left out: not pictures right in a class's folder)" if left_out else ""
    return Rows("class-folders", note, len(files), PictureReader(files, LABEL_PROMPT.format(language=language)))


def files_below(folder: Path) -> int:
    count = 0
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_junk(name)]
        count += sum(not is_junk(name) for name in names)
    return count


@dataclass(frozen=True)
class PictureReader:
    files: Sequence[Path]
    prompt: str

    def __call__(self, i: int) -> Row:
        file = self.files[i]
        return Row(str(file), self.prompt, file.parent.name, i, str(file))
