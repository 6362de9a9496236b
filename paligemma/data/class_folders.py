"""A folder for each class, with its pictures -> rows: the prompt is the same in all, the answer the folder's name.

flowers/daisy/1.jpg  flowers/daisy/2.jpg  flowers/rose/1.jpg         answer en what is this? -> daisy
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paligemma.data.records import LABEL_PROMPT
from paligemma.data.rows import Row, Rows


def pictures(files: Sequence[Path], language: str) -> Rows:
    classes = {file.parent.name for file in files}
    note = f"{files[0].parent.parent}: folders of {len(classes):,} classes, {len(files):,} rows"
    return Rows("class-folders", note, len(files), PictureReader(files, LABEL_PROMPT.format(language=language)))


@dataclass(frozen=True)
class PictureReader:
    files: Sequence[Path]
    prompt: str

    def __call__(self, i: int) -> Row:
        file = self.files[i]
        return Row(str(file), self.prompt, file.parent.name, i, str(file))
