"""Which files of a folder are the data set, and what is in them?"""

import json
import re

import pytest
from samples import good, write_lines
from work_count import lines_run

from paligemma.data.folders import in_folder, splits_of
from paligemma.data.options import open_rows
from paligemma.data.rows import Row, Rows
from paligemma.train.run_folder import fingerprint_of_data

# --------------------------------------------------------------------------------------------------------------- splits


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"PAR1")


def files_of(folder, split=None):
    """Which files are read, without reading them."""
    return [file.relative_to(folder).as_posix() for file in in_folder(folder, None, split)[1]]


@pytest.mark.parametrize("train, test, split", [
    (["train.parquet"], ["test.parquet"], "train"),
    (["train/0000.parquet", "train/0001.parquet"], ["test/0000.parquet"], "train"),  # how the Hub converts
    (["default/train/0000.parquet"], ["default/test/0000.parquet"], "train"),
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
     ["data/train_extra-00000-of-00001.parquet"], "train"),
    (["train-00000-of-00001-0123456789abcdef.parquet"], ["test-00000-of-00001-0123456789abcdef.parquet"], "train"),
    (["train.parquet/part-00000-c000.snappy.parquet", "train.parquet/part-00001-c000.snappy.parquet"],
     ["test.parquet/part-00000-c000.snappy.parquet"], "train"),  # Spark's folders
    (["train-001.parquet", "train-002.parquet"], ["test-001.parquet"], "train"),
    (["train_0.parquet", "train_1.parquet"], ["test_0.parquet", "test_1.parquet"], "train"),
    (["train.0.parquet", "train.1.parquet"], ["test.0.parquet"], "train"),
    (["train-000/x_0.parquet", "train-001/x_1.parquet"], ["test-000/x_0.parquet"], "train"),
    (["coco-2017-train.parquet"], ["coco-2017-val.parquet"], "coco-2017-train"),
    (["en/train-00000-of-00001.parquet"], ["en/test-00000-of-00001.parquet"], "train"),
    (["train.jsonl"], ["train_extra.jsonl", "constrained.jsonl"], "train"),
    (["train.csv"], ["test.csv"], "train"),
    (["train.jsonl"], ["labels.csv"], "train"),  # not the CSV because it is one
    (["captions_val2014.json"], ["captions_train2014.json"], "captions_val2014"),
])  # fmt: skip
def test_a_split_is_its_own_files_and_no_other(tmp_path, train, test, split):
    put(tmp_path, *train, *test)
    assert files_of(tmp_path, split) == train


@pytest.mark.parametrize("files, split, words", [
    (["train.parquet", "test.parquet"], None, "has the splits test, train: choose one with split= (--split)"),
    (["train/0000.parquet", "test/0000.parquet"], None, "has the splits test, train: choose"),
    (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], None, "has the splits test, train:"),
    (["train_0.parquet", "train_1.parquet", "test_0.parquet"], None, "has the splits test, train: choose"),
    (["train.0.parquet", "test.0.parquet"], None, "has the splits test, train: choose"),
    (["train/0000.parquet"], "test", "has no split 'test'; it has train: choose one of these"),
    (["train.jsonl"], "test", "has no split 'test'; it has train"),
    (["train.jsonl", "val.csv"], "test", "has no split 'test'; it has val, train"),
    (["0000.parquet"], "test", "has no split 'test'; it has (numbers alone)"),
    # both languages have one
    (["de/train-00000-of-00001.parquet", "en/train-00000-of-00001.parquet"], "train", "the splits de/train, en/train"),
    # a language is no split
    (["en/test-00000-of-00001.parquet", "en/train-00000-of-00001.parquet"], "en", "the splits en/test, en/train"),
    (["train-00000.csv", "train-00001.csv"], "train", "2 files that could be meant"),
])  # fmt: skip
def test_splits_are_never_mixed_nor_ignored(tmp_path, files, split, words):
    put(tmp_path, *files)
    with pytest.raises(ValueError, match=re.escape(words)):
        open_rows(tmp_path, split=split)


SHARDS = [
    ["0000.parquet", "0001.parquet"],
    ["part-00000-c000.parquet", "part-00001-c000.parquet"],  # Spark
    ["year=2020/part-00000-c0.snappy.parquet", "year=2021/part-00000-c0.snappy.parquet"],  # Spark's partitionBy, Hive
    ["name-00000.parquet", "name-00001.parquet"],
    ["name-001.parquet", "name-002.parquet"],
    ["part.0.parquet", "part.1.parquet", "part.10.parquet", *(f"part.{i}.parquet" for i in range(2, 10))],  # dask
    ["data_0.parquet", "data_1.parquet"],  # DuckDB
    ["name-000000000000.parquet", "name-000000000001.parquet"],  # BigQuery
    ["data/chunk-000/episode_000000.parquet", "data/chunk-000/episode_000001.parquet",
     "data/chunk-001/episode_000002.parquet"],  # LeRobot
]  # fmt: skip


@pytest.mark.parametrize("files", SHARDS)
def test_files_of_one_split_need_no_choice(tmp_path, files):
    put(tmp_path, *files, "_SUCCESS")
    assert files_of(tmp_path) == files


@pytest.mark.parametrize("form", ["{}/", "split={}/", "year=2020/split={}/"])
@pytest.mark.parametrize("files", SHARDS)
def test_shards_of_several_splits_demand_a_choice(tmp_path, files, form):
    put(tmp_path, *(form.format(split) + file for split in ("train", "test") for file in files))
    with pytest.raises(ValueError, match=r"has the splits test\S*, train\S*: choose one with split="):
        files_of(tmp_path)
    assert files_of(tmp_path, "train") == [form.format("train") + file for file in files]


@pytest.mark.parametrize("files, names", [
    (["coco-2014.parquet", "coco-2017.parquet"], "coco-2014, coco-2017"),
    (["coco-2014/x_0.parquet", "coco-2014/x_1.parquet", "coco-2017/x_0.parquet"], "coco-2014/x, coco-2017/x"),
    (["x_0.parquet", "x_2.parquet"], "x_0, x_2"),  # a hole
    (["x_2.parquet", "x_3.parquet"], "x_2, x_3"),  # no beginning
    (["train.parquet", "train_1.parquet"], "train, train_1"),  # a copy, perhaps
    (["2014/0000.parquet", "2017/0000.parquet"], "2014, 2017"),
])  # fmt: skip
def test_numbers_that_do_not_count_shards_tell_data_sets_apart(tmp_path, files, names):
    put(tmp_path, *files)
    with pytest.raises(ValueError, match=f"has the splits {names}: choose one"):
        files_of(tmp_path)
    assert files_of(tmp_path, names.split(", ")[1]) == files[-1:]


def test_work_on_many_shards_grows_with_their_number_and_not_with_its_square(tmp_path):
    def work(count):
        files = [tmp_path / f"chunk-{i // 100:03d}/episode_{i:06d}.parquet" for i in range(count)]
        assert splits_of(files, tmp_path) == {"chunk/episode": files}
        return lines_run(lambda: splits_of(files, tmp_path))

    assert work(2000) < 3 * work(1000)


def test_a_folder_is_no_file_whatever_it_is_called(tmp_path):
    put(tmp_path, "x.csv/notes.txt", "y.csv")
    assert files_of(tmp_path) == ["y.csv"]


def test_the_split_of_a_full_name_comes_first(tmp_path):
    put(tmp_path, "train.parquet", "extra/train.parquet")
    assert files_of(tmp_path, "train") == ["train.parquet"]
    assert files_of(tmp_path, "extra/train") == ["extra/train.parquet"]


def test_where_there_are_no_splits_none_can_be_chosen(folder):
    with pytest.raises(ValueError, match=r"my\.jsonl is a single file, without splits: leave out split="):
        open_rows(write_lines(folder, good()), split="train")
    (folder / "saved").mkdir()
    (folder / "saved" / "state.json").write_text('{"_data_files": ["data.arrow"]}')
    with pytest.raises(ValueError, match="saved is one data set, without splits: leave out split="):
        open_rows(folder / "saved", split="train")
    (folder / "dataset_dict.json").write_text('{"splits": ["saved", "test"]}')
    with pytest.raises(ValueError, match="has the splits saved, test: choose one"):
        open_rows(folder)
    with pytest.raises(ValueError, match="has no split 'train'; it has saved, test"):
        open_rows(folder, split="train")
    assert in_folder(folder, None, "saved") == ("arrow", [folder / "saved" / "data.arrow"])


# ---------------------------------------------------------------------------------------------------------- what is it?


def test_what_cannot_be_opened(folder, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match=r"nothing.jsonl: no such file or folder"):
        open_rows(folder / "nothing.jsonl")
    with pytest.raises(ValueError, match="a folder without a CSV file"):
        open_rows(folder)  # with pictures alone
    with pytest.raises(ValueError, match="no kind of data 'yolo'; there are: jsonl, json, csv"):
        open_rows(folder, kind="yolo")
    for name, content, words in (
        ("x.txt", b"hello\n", "There are jsonl, json, csv, parquet"),
        ("empty.jsonl", b" \n", "is empty"),
        ("x.jsonl.gz", b"\x1f\x8b123", "is compressed"),
        ("x.json", b'{"version":\n 1}', "the keys version"),
        ("broken.json", b'{"images": [', "is not JSON"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            open_rows(folder / name)


@pytest.mark.parametrize("name, text, kind", [
    ("x", '{"image": "a", "prefix": "b", "suffix": "c"}', "jsonl"),
    ("x.json", '{"image": "a", "caption": "b"}\n{"image": "a", "caption": "b"}\n', "jsonl"),
    ("x.jsonl", '{"image": \n', "jsonl"),  # a broken line is one row's problem
    ("x.txt", "\ufeff image;caption\r\na;b\r\n", "csv"),
    ("x.tsv", "file_name\ttext\n", "csv"),
    ("x.json", '[{"image": "a", "caption": "b"}]', "json"),
    ("x.json", '{"images": [], "categories": [], "annotations": []}', "coco-detect"),
])  # fmt: skip
def test_the_kind_follows_from_the_content(tmp_path, name, text, kind):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert open_rows(tmp_path / name).kind == kind


# ---------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_that_of_the_rows_files_alone(folder):
    """A run that is written into the folder of its data goes on, whatever else lies there, unless its data change."""
    (folder / "list.csv").write_text("image,caption\na.png,a dog\n")
    rows = open_rows(folder)
    assert rows.files == (folder / "list.csv",)
    before = fingerprint_of_data(rows)
    (folder / "run").mkdir()
    for name in ("run/settings.json", "run/log.jsonl", "run/table.csv"):
        (folder / name).write_text("{}")
    assert fingerprint_of_data(open_rows(folder)) == fingerprint_of_data(open_rows(folder / "list.csv")) == before
    (folder / "list.csv").write_text("image,caption\na.png,a cat\n")
    assert fingerprint_of_data(open_rows(folder)) != before


def test_the_fingerprint_takes_in_the_answers(folder):
    questions = {"questions": [{"image_id": 7, "question": "is it red ?", "question_id": 70}]}
    (folder / "q.json").write_text(json.dumps(questions))
    found = set()
    for answer in ("yes", "no"):
        answers = {"annotations": [{"question_id": 70, "answers": [{"answer": answer}]}]}
        (folder / "a.json").write_text(json.dumps(answers))
        rows = open_rows(folder / "q.json", annotations=folder / "a.json")
        assert rows.files == (folder / "q.json", folder / "a.json")
        found.add(fingerprint_of_data(rows))
    (folder / "q.json").write_text(json.dumps({**questions, **answers}))
    rows = open_rows(folder / "q.json")
    assert rows.files == (folder / "q.json",) and len(found | {fingerprint_of_data(rows)}) == 3


def test_rows_of_no_file_have_no_fingerprint():
    assert fingerprint_of_data(Rows("jsonl", "made up", 1, lambda i: Row(None, "a", "b", i, "here"))) is None
