"""What can be an INPUT, and what can stand in a file of --rows."""

import base64
import io
import json
import os
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from PIL import Image

from paligemma.batch import videos
from paligemma.batch.inputs import digest_of_lists, files_below, list_inputs
from paligemma.batch.openai_format import read_request, response_line
from paligemma.batch.pictures import bytes_of, open_picture
from paligemma.batch.row_files import is_batch_file, list_rows
from paligemma.batch.rows import InputRow, RowFailure, answered, failed
from paligemma.data.openai_chat import NEUTRAL
from paligemma.images import load_image


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/a.jpg, photos/x/a.jpg and photos/x/b.png, each of one colour."""
    monkeypatch.chdir(tmp_path)
    for name, color in (("a.jpg", "red"), ("x/a.jpg", "lime"), ("x/b.png", "blue")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), color).save(path)
    return tmp_path / "photos"


def listed(*inputs, **options):
    return list(list_inputs(inputs, "caption en", **options))


def ids(*inputs, **options):
    return [row.id for row in listed(*inputs, **options)]


def color_of(row):
    red, green, _ = open_picture(row.image).getpixel((0, 0))
    return "red" if red > 200 else "lime" if green > 200 else "blue"


# ---------------------------------------------------------------------------------------------- INPUT


def test_a_folder_stands_for_the_pictures_below_it(photos):
    (photos / "notes.txt").write_text("hello")
    notes = []
    rows = listed("photos", note=notes.append)
    assert [row.id for row in rows] == ["a.jpg", "x/a.jpg", "x/b.png"]
    assert [row.image for row in rows] == [str(photos / name) for name in ("a.jpg", "x/a.jpg", "x/b.png")]
    assert {row.prompt for row in rows} == {"caption en"}
    assert notes == ["note: photos: 1 files are no pictures by their names and are left out"]


def test_what_programs_leave_behind_is_no_picture(photos):
    """macOS writes ._a.jpg beside a.jpg, on USB disks and into archives."""
    (photos / ".git").mkdir()
    for name in (".git/a.jpg", ".git/index", "x/._a.jpg"):
        (photos / name).write_bytes((photos / "a.jpg").read_bytes())
    notes = []
    assert [row.id for row in listed("photos", note=notes.append)] == ["a.jpg", "x/a.jpg", "x/b.png"]
    assert not notes  # a word about each file of .git would help nobody
    with tarfile.open("set.tar", "w") as archive:
        archive.add("photos", "./photos")
        archive.add("photos/a.jpg", "__MACOSX/a.jpg")
    assert sorted(ids("set.tar")) == [f"set.tar/photos/{name}" for name in ("a.jpg", "x/a.jpg", "x/b.png")]


def test_pictures_and_patterns_have_the_path_as_their_id(photos):
    assert ids("photos/a.jpg", "photos/x/a.jpg") == ["photos/a.jpg", "photos/x/a.jpg"]
    assert ids("photos/**/*.jpg") == ["photos/a.jpg", "photos/x/a.jpg"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        ids("photos/*.gif")
    with pytest.raises(
        FileNotFoundError, match=r"photos/x\*: no file matches this pattern, only folders: name a folder"
    ):
        ids("photos/a.jpg", "photos/x*")


def test_a_list_of_paths_and_stdin(photos):
    lines = "\ufeffphotos/a.jpg\r\n\nphotos/nowhere.jpg\n"
    (photos / "list.txt").write_text(lines, encoding="utf-8", newline="")
    assert ids("photos/list.txt") == ["photos/a.jpg", "photos/nowhere.jpg"]
    assert ids("-", stdin=io.BytesIO(lines.encode())) == ["photos/a.jpg", "photos/nowhere.jpg"]


def test_a_name_that_is_no_utf8_is_opened_and_its_id_is_written_with_escapes(photos):
    try:
        os.rename(b"photos/a.jpg", b"photos/\xff.jpg")
    except OSError:
        pytest.skip("this disk takes UTF-8 names alone")
    row = listed("photos")[-1]
    assert row.id == r"\xff.jpg" and color_of(row) == "red"
    again = InputRow.from_json(row.to_json().encode())
    assert again == row and color_of(again) == "red"
    line = failed(row, "unreadable", f"{row.image} is broken")
    json.dumps(line, ensure_ascii=False).encode()
    assert r"\xff.jpg" in line["image"] and r"\xff.jpg" in line["error"]["message"]


def test_links_to_folders_are_followed_but_not_in_a_circle(photos, tmp_path):
    os.symlink(photos, photos / "x" / "circle")
    (tmp_path / "other").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "other" / "c.png")
    os.symlink(tmp_path / "other", photos / "link")
    os.symlink("loop.png", photos / "loop.png")
    assert ids("photos") == ["a.jpg", "link/c.png", "loop.png", "x/a.jpg", "x/b.png"]


def test_nothing_to_read_is_an_error(photos):
    (photos / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no picture in this folder"):
        ids("photos/empty")
    for url in ("https://example.org/a.jpg", "s3://bucket/a.jpg"):
        with pytest.raises(ValueError, match=r"is a URL.*download it first"):
            ids(url)
    with pytest.raises(ValueError, match=r"stdin:1: http://x/a\.jpg is a URL"):
        ids("-", stdin=io.BytesIO(b"http://x/a.jpg\n"))


def test_a_picture_that_is_not_there_is_a_row(photos):
    """Its line will say that it is missing: a list of a million names may have one wrong one."""
    (row,) = listed("nowhere.jpg")
    with pytest.raises(RowFailure, match=r"nowhere\.jpg: no such file"):
        open_picture(row.image)


def test_files_are_listed_without_looking_at_each(photos, monkeypatch):
    """A folder of a million files is listed by its entries: no file is opened or asked for its size."""
    looked = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *more, **named: looked.append(path) or stat(path, *more, **named))
    assert len(list(files_below("photos"))) == 3
    assert looked == ["photos", "photos/x", "photos/x"]


# ---------------------------------------------------------------------------------------------- archives, videos


def test_pictures_of_a_tar_are_read_where_they_lie(photos):
    (photos / "a.json").write_text("{}")
    with tarfile.open("set.tar", "w") as archive:
        for name in ("a.jpg", "x/b.png", "a.json"):
            archive.add(photos / name, f"./{name}")
    notes = []
    rows = listed("set.tar", note=notes.append)
    assert [row.id for row in rows] == ["set.tar/a.jpg", "set.tar/x/b.png"]
    assert [color_of(row) for row in rows] == ["red", "blue"]
    assert "1 files in it are no pictures" in notes[0]
    assert bytes_of(rows[0].image) == (photos / "a.jpg").read_bytes()
    assert rows[0].image["name"].endswith("set.tar/a.jpg")
    os.truncate("set.tar", 600)
    with pytest.raises(RowFailure, match="shorter than it was"):
        open_picture(rows[1].image)


def packed(name, members):
    """A tar archive of these files, all of one size: a jpg each."""
    with tarfile.open(name, "w") as archive:
        for inside, path in members:
            archive.add(path, inside)


def test_a_tar_that_changed_is_not_read_under_the_old_names(photos):
    """Its members may have the old sizes and lie at the old places: only their headers tell them apart."""
    (photos / "b.jpg").write_bytes((photos / "x/a.jpg").read_bytes().ljust((photos / "a.jpg").stat().st_size, b"\0"))
    both = [(name, photos / name) for name in ("a.jpg", "b.jpg")]
    packed("set.tar", both)
    before, rows = digest_of_lists(["set.tar"], None), listed("set.tar")
    assert [color_of(row) for row in rows] == ["red", "lime"]
    packed("set.tar", both[::-1])
    assert [row.image["start"] for row in rows] == [row.image["start"] for row in listed("set.tar")]
    assert digest_of_lists(["set.tar"], None) != before is not None  # a run that goes on: exit code 2
    for row in rows:  # one that goes on meanwhile, and one with archives in a folder or list
        with pytest.raises(RowFailure, match="has changed since its pictures were listed"):
            open_picture(row.image)
    packed("set.tar", both)
    assert digest_of_lists(["set.tar"], None) == before and color_of(rows[0]) == "red"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_with_long_names_are_known_again(photos, format):
    """Their name stands before the header, in blocks of its own or in two parts."""
    with tarfile.open("set.tar", "w", format=format) as archive:
        for name in ("a.jpg", "x/a.jpg"):
            archive.add(photos / name, f"{'folder/' * 15}{name}")
    assert [color_of(row) for row in listed("set.tar")] == ["red", "lime"]


def test_what_is_no_archive_is_said(photos):
    (photos / "x.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match="is no tar archive that can be read"):
        ids("photos/x.tar")
    with pytest.raises(ValueError, match=r"compressed.*unpack it"):
        ids("photos/x.tar.gz")


def test_an_archive_that_is_damaged_in_the_middle_is_said(photos):
    """tarfile itself takes a damaged header for the end, and would leave out all that follows."""
    with tarfile.open("set.tar", "w") as archive:
        archive.add(photos / "a.jpg", "a.jpg")
        second = archive.offset
        archive.add(photos / "x", "x")
    whole = (photos.parent / "set.tar").read_bytes()
    (photos / "damaged.tar").write_bytes(whole[:second] + b"damage" + whole[second + 6 :])
    with pytest.raises(ValueError, match=rf"no tar archive that can be read \(at byte {second:,} it has b'damage"):
        ids("photos/damaged.tar")
    (photos / "cut.tar").write_bytes(whole[: second + 100])
    with pytest.raises(ValueError, match="no tar archive that can be read"):
        ids("photos/cut.tar")
    notes = []
    (photos / "open.tar").write_bytes(whole[:second])
    assert ids("photos/open.tar", note=notes.append) == ["photos/open.tar/a.jpg"]
    assert notes[0].startswith("note: photos/open.tar ends without the block of zeros")


@pytest.fixture
def pyav(monkeypatch):
    """A stand-in for PyAV: every video has a frame each tenth of a second for 2.5 s, grey as its number."""

    class FFmpegError(Exception):
        pass

    def frame(number):
        picture = Image.new("RGB", (2, 2), (number, number, number))
        return SimpleNamespace(pts=number + 100, to_image=lambda: picture)

    class Container:
        def __init__(self, path):
            self.path, self.position, self.duration = path, 0, None
            stream = SimpleNamespace(time_base=0.1, start_time=100, duration=None if "endless" in path else 25)
            self.streams = SimpleNamespace(video=[stream])

        def seek(self, pts, stream, backward):
            seeks.append(pts)
            self.position = max(0, (pts - 100) // 10 * 10)  # key frames are a second apart

        def decode(self, stream):
            for number in range(self.position, 25):
                time.sleep(1e-4)  # other threads run meanwhile, as they do while FFmpeg decodes
                if "damaged" in self.path and number == 15:
                    raise FFmpegError("invalid data")
                yield frame(number)

        def close(self):
            pass

    seeks = []

    def open_container(path):
        if "broken" in path:
            raise FFmpegError("invalid data")
        return Container(path)

    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=open_container, FFmpegError=FFmpegError))
    videos.open_video.cache_clear()
    return seeks


def test_frames_of_a_video(pyav, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = listed("x.mp4", every=0.75)
    assert [row.id for row in rows] == ["x.mp4/0000.000", "x.mp4/0000.750", "x.mp4/0001.500", "x.mp4/0002.250"]
    assert [open_picture(row.image).getpixel((0, 0))[0] for row in rows] == [0, 7, 15, 22]
    assert len(pyav) == 1  # in order they are decoded in one go
    assert open_picture(rows[1].image).getpixel((0, 0))[0] == 7  # and out of order they are looked for


def test_two_threads_take_frames_of_one_video(pyav):
    """They share the decoder, as the threads do that open pictures ahead."""
    rows = listed("x.mp4", every=0.1)
    with ThreadPoolExecutor(2) as pool:
        pictures = list(pool.map(lambda row: open_picture(row.image), rows))
    assert [picture.getpixel((0, 0))[0] for picture in pictures] == list(range(25))


def test_a_frame_may_be_asked_for_any_number_of_times(pyav):
    video = videos.open_video("x.mp4")
    assert {video.frame_at(0.25).getpixel((0, 0))[0] for _ in range(1500)} == {2}
    assert video.frame_at(0.4).getpixel((0, 0))[0] == 4
    assert len(pyav) == 1


def test_damage_in_a_video_concerns_the_frames_up_to_the_next_key_frame(pyav):
    """None of them is answered with an earlier frame."""
    video = videos.open_video("damaged.mp4")
    assert [video.frame_at(time).getpixel((0, 0))[0] for time in (1.2, 1.3)] == [12, 13]
    for moment in (1.5, 1.6, 1.9):
        with pytest.raises(ValueError, match=rf"damaged near {moment}00 s: invalid data"):
            video.frame_at(moment)
    assert video.frame_at(2.1).getpixel((0, 0))[0] == 21


def test_what_is_wrong_with_a_video_is_said(pyav, monkeypatch):
    with pytest.raises(ValueError, match="--every SECONDS"):
        ids("x.mp4")
    with pytest.raises(ValueError, match="does not say how long it is"):
        ids("endless.mp4", every=1)
    with pytest.raises(OSError, match=r"broken\.mp4 is no video"):
        ids("broken.mp4", every=1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        ids("x.mp4", every=1)


def test_videos_of_a_folder_are_asked_about_with_every(pyav, photos):
    (photos / "v.mp4").touch()
    assert ids("photos", every=1) == [
        "a.jpg",
        "v.mp4/0000.000",
        "v.mp4/0001.000",
        "v.mp4/0002.000",
        "x/a.jpg",
        "x/b.png",
    ]
    assert ids("photos", note=lambda text: None) == ["a.jpg", "x/a.jpg", "x/b.png"]


# ---------------------------------------------------------------------------------------------- --rows


def data_url(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_rows_of_json_lines(photos):
    lines = [
        {"id": 7, "image": "a.jpg", "prompt": "ocr"},
        {"image": "x/a.jpg", "prefix": "caption de"},
        {"id": "inside", "image": data_url(photos / "x" / "b.png")},
        {"id": "none", "image": None},
        {"id": "two", "image": ["a.jpg", data_url(photos / "x" / "b.png")]},
        {"id": "in a dict", "image": {"bytes": None, "path": "x/a.jpg"}},
        {"id": "inside a dict", "image": {"path": data_url(photos / "x" / "b.png")}},
    ]
    (photos / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = list(list_rows("photos/rows.jsonl", "caption en"))
    assert [row.id for row in rows] == ["7", "x/a.jpg", "inside", "none", "two", "in a dict", "inside a dict"]
    assert [row.prompt for row in rows] == ["ocr", "caption de", *["caption en"] * 5]
    assert [color_of(row) for row in rows[:3]] == ["red", "lime", "blue"]
    assert rows[2].image["name"].endswith("rows.jsonl:3")  # its place: a large file is not copied
    assert rows[3].image is None
    assert [load_image(open_picture(place)).size for place in rows[4].image] == [(16, 16), (16, 16)]
    assert [color_of(row) for row in rows[5:]] == ["lime", "blue"]


def test_rows_of_csv_and_parquet(photos):
    (photos / "rows.csv").write_text("id;image;prompt\n1;a.jpg;ocr\n2;x/b.png;caption en\n")
    rows = list(list_rows("photos/rows.csv"))
    assert [(row.id, row.prompt, color_of(row)) for row in rows] == [("1", "ocr", "red"), ("2", "caption en", "blue")]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pictures = [{"bytes": (photos / "a.jpg").read_bytes(), "path": None}, {"bytes": None, "path": "x/b.png"}]
    pyarrow.parquet.write_table(pa.table({"image": pictures, "id": ["p", "q"]}), photos / "rows.parquet")
    rows = list(list_rows("photos/rows.parquet", "caption en"))
    assert [(row.id, color_of(row)) for row in rows] == [("p", "red"), ("q", "blue")]
    pyarrow.parquet.write_table(pa.table({"image": ["a.jpg", None, ""]}), photos / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet row 2: the image is empty"):
        list(list_rows("photos/rows.parquet", "caption en"))


def test_blank_cells_of_a_csv_are_null(photos):
    (photos / "rows.csv").write_text("id,image,prompt\n,a.jpg,ocr\n,x/a.jpg,\n9,x/b.png, \n,,\n")
    rows = list(list_rows("photos/rows.csv", "caption en"))
    assert [(row.id, row.prompt) for row in rows] == [
        ("a.jpg", "ocr"), ("x/a.jpg", "caption en"), ("9", "caption en"), ("rows.csv:4", "caption en"),
    ]  # fmt: skip
    assert rows[3].image is None
    with pytest.raises(ValueError, match=r"rows.csv:3: no prompt"):
        list(list_rows("photos/rows.csv"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"image": "a.jpg"}', r"rows.jsonl:2: no prompt"),
        ('{"prompt": "ocr", "picture_": "a.jpg"}', r"rows.jsonl:2: no image"),
        ('{"image": "https://x/a.jpg", "prompt": "ocr"}', r"rows.jsonl:2: https://x/a.jpg is a URL"),
        ('{"image": 7, "prompt": "ocr"}', r"rows.jsonl:2: the image is int"),
        ('{"image": "", "prompt": "ocr"}', r"rows.jsonl:2: the image is empty, expected the path .* or null"),
        ('{"image": ["a.jpg", ""], "prompt": "ocr"}', r"rows.jsonl:2: the image is empty"),
        ('{"image": ["a.jpg", null], "prompt": "ocr"}', r"rows.jsonl:2: the image is empty"),
        ('{"image": {"path": null}, "prompt": "ocr"}', r"rows.jsonl:2: the image is empty"),
        ('{"image": {"bytes": "AAAA"}, "prompt": "ocr"}', r"rows.jsonl:2: the bytes of the image are text"),
        ("no json", r"rows.jsonl:2: not JSON"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_before_work_starts(photos, line, said):
    (photos / "rows.jsonl").write_text('{"image": "a.jpg", "prompt": "ocr"}\n' + line)
    with pytest.raises(ValueError, match=said):
        list(list_rows("photos/rows.jsonl"))


def test_lists_are_known_again_by_their_content(photos):
    (photos / "list.txt").write_text("a.jpg\n")
    before = digest_of_lists([str(photos / "list.txt")], None)
    (photos / "list.txt").write_text("b.jpg\n")
    assert before != digest_of_lists([str(photos / "list.txt")], None) is not None
    assert digest_of_lists([str(photos), "-"], None) is None  # a folder may grow


# ---------------------------------------------------------------------------------------------- OpenAI's batch format


def request(body=(), **other):
    content = [{"type": "text", "text": "caption en"}, {"type": "image_url", "image_url": {"url": "a.jpg"}}]
    whole = {"model": "x", "messages": [{"role": "user", "content": content}], **dict(body)}
    return {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": whole, **other}


def part_of(part):
    """A request whose message has one part."""
    return request({"messages": [{"role": "user", "content": [part]}]})


def test_requests_of_openai(photos):
    one = request({"max_tokens": 20, "temperature": 0, "top_k": None, "n": 1, "user": "me"})
    two = request()
    two["custom_id"] = "r2"
    two["body"]["messages"][0]["content"][1]["image_url"]["url"] = data_url(photos / "x" / "b.png")
    (photos / "batch.jsonl").write_text(f"{json.dumps(one)}\n{json.dumps(two)}\n")
    rows = list(list_rows("photos/batch.jsonl"))
    assert [(row.id, row.prompt, color_of(row)) for row in rows] == [
        ("r1", "caption en", "red"), ("r2", "caption en", "blue"),
    ]  # fmt: skip
    assert rows[0].options == {"max_new_tokens": 20, "temperature": 0}
    assert is_batch_file("photos/batch.jsonl") and not is_batch_file("photos/a.jpg") and not is_batch_file(None)


def test_what_the_server_takes_for_nothing_is_taken_in_a_batch_file_too():
    for name, values in NEUTRAL.items():
        for value in (*values, None):
            assert read_request(request({name: value}), "here")[3] == {}
    one = request()
    one["body"] |= {"stream": False, "stream_options": {"include_usage": True}, "logprobs": None}
    one["body"]["messages"][0]["name"] = "me"
    one["body"]["messages"][0]["content"][1]["image_url"]["detail"] = "high"
    assert read_request(one, "here") == ("r1", "caption en", ["a.jpg"], {})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (request({"logit_bias": {"5": 1}}), "here: body.logit_bias is .* not supported"),
        (request({"n": 2}), "body.n is"),
        (request(custom_id=None), "custom_id is None, expected a string"),
        (request(custom_id=["a"]), "custom_id is .*, expected a string"),
        (request(custom_id=""), "custom_id is '', expected a string"),
        (request({"max_tokens": 0}), "body.max_tokens is 0, expected a whole number from 1"),
        (request({"top_p": 5}), "body.top_p is 5, expected a number above 0 and at most 1"),
        (request({"max_tokens": 5, "max_completion_tokens": 6}), "max_tokens and max_completion_tokens differ"),
        (request({"top_p": 0}), "body.top_p is 0"),
        (request({"temperature": float("nan")}), "body.temperature is nan"),
        (request({"seed": True}), "body.seed is True, expected a whole number"),
        (request({"constrained": "no"}), "body.constrained is 'no', expected true or false"),
        (request({"messages": ["hi"]}), "one message with the role user"),
        (part_of({"type": "text", "text": 7}), "here: body.messages.0..content.0..text is 7, expected a string"),
        (
            part_of({"type": "image_url", "image_url": {"url": None}}),
            "content.0..image_url.url is null",
        ),
        (request({"temperature": "hot"}), "body.temperature is 'hot', expected a number"),
        (request({"messages": [{"role": "system", "content": "be nice"}]}), "one message with the role user"),
        (
            request({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}),
            "content.0..type is 'audio', expected text",
        ),
        (part_of({"type": "text", "text": "hi", "x": 1}), "here: unknown field 'body.messages.0..content.0..x'"),
        (part_of({"type": "image_url", "image_url": {"url": "a.jpg", "size": 3}}), "unknown field .*image_url.size'"),
        (
            request({"messages": [{"role": "user", "content": "hi", "x": []}]}),
            "here: unknown field 'body.messages.0..x'",
        ),
        (request({"n": True}), "body.n is 'True'"),
        (request({"presence_penalty": False}), "body.presence_penalty is 'False'"),
        (request({"other": None}), "body.other is 'None'"),
        (request(url="/v1/embeddings"), "expected POST /v1/chat/completions"),
    ],
)
def test_what_a_request_asks_in_vain_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        read_request(wrong, "here")


def test_answers_in_openais_format():
    row = InputRow("r1", None, "caption en")
    answer = SimpleNamespace(text="a dog", score=0.5, finished=False, detections=[], segments=[], invalid=[])
    line = response_line(answered(row, answer, (4, 3), "rle"), "tiny", 7)
    choice = line["response"]["body"]["choices"][0]
    assert (line["custom_id"], line["response"]["status_code"], line["error"]) == ("r1", 200, None)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a dog", "length")
    assert choice["message"]["paligemma"]["image_size"] == [4, 3]
    assert line["response"]["body"]["created"] == 7
    for kind, status in (("missing", 400), ("too_many_pixels", 413), ("internal", 500)):
        line = response_line(failed(row, kind, "because"), "tiny", 7)
        assert line["response"]["status_code"] == status
        assert line["response"]["body"]["error"]["code"] == kind
