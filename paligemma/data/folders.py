"""Which files of a folder are the data set, and of which split."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from paligemma.data.rows import short
from paligemma.files import is_junk, picture_names, read_json

SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
TABLES = (("csv", (".csv", ".tsv")), ("jsonl", (".jsonl", ".ndjson")), (None, (".json",)))


def in_folder(folder: Path, kind: str | None, split: str | None) -> tuple[str | None, list[Path]]:
    """The kind and the files of the data set in a folder. They are of one split, and of several none is chosen unasked:
    who trains on "test" too doesn't see it."""
    saved = folder / "dataset_dict.json"  # several data sets that `datasets` has saved together
    if saved.is_file():
        splits = {name: [folder / Path(name).name] for name in _names_in(saved, "splits")}
        return in_folder(of_one_split(splits, folder, split)[0], kind, None)
    state = folder / "state.json"
    if state.is_file() and kind in (None, "arrow"):
        if split is not None:
            raise ValueError(f"{folder} is one data set, without splits: leave out split= (--split)")
        return "arrow", [folder / Path(name).name for name in _names_in(state, "_data_files")]
    yaml = [folder / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (folder / name).is_file()]
    if yaml and (kind is None or kind.startswith("yolo")):
        return kind or "yolo-detect", yaml[:1]  # which has the splits

    parquet = sorted(file for file in folder.rglob("*.parquet") if file.is_file())  # Spark calls folders so too
    if parquet and kind in (None, "parquet"):
        return "parquet", of_one_split(splits_of(parquet, folder), folder, split)
    if found := _annotations(folder, kind, split) or _table(folder, kind, split):
        return found
    if below := _splits_below(folder, kind):
        return in_folder(of_one_split(below, folder, split)[0], kind, None)
    if others := [file for _, files in _tables(folder, kind) for file in files]:
        return None, of_one_split(splits_of(others, folder), folder, split)  # which says what there is
    if split is None and kind in (None, "class-folders") and (pictures := _pictures_of_classes(folder)):
        return "class-folders", pictures
    raise ValueError(
        f"{folder} is a folder without a CSV file that says what its pictures show (nor JSON lines, JSON, parquet, a "
        "data set of Hugging Face, YOLO, VOC or LabelMe, or a folder for each class): write a CSV with the columns "
        "image, prefix, suffix"
    )


def _names_in(file: Path, key: str) -> list[str]:
    """The names under a key of `dataset_dict.json` or `state.json`: text, or objects with a "filename". They come out
    of a file, so the caller takes their last part alone: they must not lead elsewhere."""
    entries = listed if isinstance(listed := read_json(file).get(key), list) else []
    found = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    names = [name for name in found if isinstance(name, str) and Path(name).name not in ("", "..")]
    if not names or len(names) < len(found):
        raise ValueError(f"{file}: expected names of files under {key!r}, got {short(listed)}: save it again")
    return names


def _tables(folder: Path, kind: str | None) -> Iterator[tuple[str | None, list[Path]]]:
    """Files of rows right in the folder, kind by kind."""
    for name, endings in TABLES:
        if kind is None or name in (None, kind):
            yield name, sorted(file for file in folder.iterdir() if file.suffix.lower() in endings and file.is_file())


def _table(folder: Path, kind: str | None, split: str | None) -> tuple[str | None, list[Path]] | None:
    """The one file of rows in the folder (of the split)."""
    for name, files in _tables(folder, kind):
        found = files if split is None else splits_of(files, folder).get(split, [])
        if len(found) > 1:
            raise ValueError(
                f"{folder} has {len(found)} files that could be meant ({', '.join(file.name for file in found[:5])}"
                f"{', ...' if len(found) > 5 else ''}): name one of them"
            )
        if found:
            return kind or name, found
    return None


def _annotations(folder: Path, kind: str | None, split: str | None) -> tuple[str, list[Path]] | None:
    """Files that annotate one picture each: VOC's XML, LabelMe's JSON."""
    if kind in (None, "voc"):
        places = [folder / "Annotations", folder / "annotations", folder]
        found = next((files for place in places if (files := sorted(place.glob("*.xml")))), [])
        found = found if kind or (found and _begins_with(found[0], b"<annotation")) else []
        chosen = folder / "ImageSets" / "Main" / f"{split}.txt"
        if found and split is not None and chosen.is_file():
            stems = {file.stem for file in found}
            lines = [line.strip() for line in chosen.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            # The lists of a class have -1, 0 or 1 behind the name, which may contain spaces itself.
            names = {line if line in stems else line.rsplit(None, 1)[0] for line in lines}
            if missing := sorted(names - stems):
                raise ValueError(
                    f"{chosen} names {len(missing):,} pictures without an XML file in {found[0].parent} "
                    f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): mend the list or add the files"
                )
            if not names:
                raise ValueError(f"{chosen} is empty: expected a name on each line")
            return "voc", [file for file in found if file.stem in names]
        if found and split is None:
            return "voc", found
    if split is None and (kind is None or kind.startswith("labelme")):
        found = sorted(folder.glob("*.json"))
        if found and (kind is not None or _begins_with(found[0], b'"shapes"')):
            return kind or "labelme-detect", found
    return None


def _begins_with(file: Path, word: bytes) -> bool:
    """Whether a word stands in the beginning of a file."""
    with open(file, "rb") as content:
        return word in content.read(1 << 16)


def _splits_below(folder: Path, kind: str | None) -> dict[str, list[Path]]:
    """Folders called after splits, as "train" and "valid", with data in them."""
    splits = {}
    for name in SPLITS:
        below = folder / name
        if not below.is_dir():
            continue
        try:
            in_folder(below, kind, None)
        except ValueError:
            continue
        splits[name] = [below]
    return splits


def _pictures_of_classes(folder: Path) -> list[Path]:
    wanted = picture_names()
    return sorted(
        file
        for file in folder.glob("*/*")
        if file.suffix.lower() in wanted and not (is_junk(file.parent.name) or is_junk(file.name)) and file.is_file()
    )


# What numbers the files that belong together: all of the name, all that Spark writes, or the end of it.
_NUMBER = re.compile(r"^\d+$|^part-\d+.*$|-\d{5}(-of-\d{5})?(-[0-9a-f]+)?$")


def splits_of(files: Sequence[Path], folder: Path) -> dict[str, list[Path]]:
    """The files of each split. Its name is what remains of their paths without numbers: "train" of `train.jsonl`,
    `data/train-00000-of-00002.parquet`, `train/0000.parquet`, `train.parquet/part-00000.parquet` and
    `split=train/year=2020/part-00000.parquet`, "en/train" of `en/train-00000-of-00001.parquet`."""
    names = []
    for file in files:
        *folders, _ = file.relative_to(folder).parts
        parts = [part.removesuffix(".parquet") for part in folders if part != "data"]  # as the Hub likes to call it
        # Hive and Spark: a column's value, of which rows of one split may have any
        parts = [part.removeprefix("split=") for part in parts if "=" not in part or part.startswith("split=")]
        parts.append(_NUMBER.sub("", file.stem))
        names.append("/".join(filter(None, parts)) or "(numbers alone)")
    splits: dict[str, list[Path]] = {}
    for name, file in zip(_without_shard_numbers(names), files, strict=True):
        splits.setdefault(name, []).append(file)
    return splits


def _without_shard_numbers(names: Sequence[str]) -> list[str]:
    """`part.0` and `part.1` -> `part` twice, `chunk-000/episode_000000` -> `chunk/episode`.

    Numbers at the end of a file's or folder's name are those of shards where they begin with 0 or 1 and count up
    without holes. Others tell data sets apart, as in `coco-2014` and `coco-2017`; so does a number whose name stands
    there without any too: `train_1` beside `train`.
    """
    pieces = [re.split(r"([-_.]\d+)(?=/|$)", name) for name in names]  # text, "-001", text, ..., text
    seen: dict[tuple[str, ...], list[set[int]]] = {}  # the texts -> the numbers at each place between them
    for parts in pieces:
        numbers = seen.setdefault(tuple(parts[::2]), [set() for _ in parts[1::2]])
        for found, number in zip(numbers, parts[1::2], strict=True):
            found.add(int(number[1:]))

    taken = set(names)
    are_shards = {
        texts: [min(found) <= 1 and max(found) - min(found) + 1 == len(found) for found in numbers]
        for texts, numbers in seen.items()
        if "".join(texts) not in taken
    }
    for parts in pieces:
        for place, is_shard in enumerate(are_shards.get(tuple(parts[::2]), ())):
            if is_shard:
                parts[2 * place + 1] = ""
    return ["".join(parts) for parts in pieces]


def of_one_split(splits: dict[str, list[Path]], folder: Path, split: str | None) -> list[Path]:
    """The files of the split that is asked for, or of the only one. "train" is "en/train" too, if no other is."""
    names = list(splits) if split is None else [name for name in splits if split in name.split("/")]
    if split in splits:
        names = [split]
    if not names:
        raise ValueError(
            f"{folder} has no split {split!r}; it has {', '.join(splits)}: choose one of these with split= (--split)"
        )
    if len(names) > 1:
        raise ValueError(
            f"{folder} has the splits {', '.join(names)}: choose one with split= (--split); files that belong together "
            "are called NAME-00000, NAME-00001, ..."
        )
    return splits[names[0]]
