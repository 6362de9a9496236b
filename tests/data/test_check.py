"""Every problem is found in its row alone."""

import pytest
from samples import BOX, CODES, good, write_lines

from paligemma.data.check import PROBLEMS, check
from paligemma.data.options import open_rows
from paligemma.data.rows import RowError

BAD = {
    "not UTF-8": [],  # written below
    "not JSON": ["{'image': 'a.png'}"],
    "half a character": [
        good(suffix="a dog \ud83d"), good(prefix="\ude00 ?"), {"image": "a.png", "caption": ["x", "y\ud83d"]},
        {"image": "a.png", "question": "x", "answer": "y", "answers": ["y", "\ud83d"]},
    ],
    "missing key": [{"image": "a.png"}],
    "wrong type": [good(suffix=1)],
    "missing picture": [good(image="gone.png"), good(image=["a.png", "gone.png"]), good(image=".")],
    "empty suffix": [good(suffix=""), good(suffix=" \n"), good(prefix="detect dog", suffix=" ")],
    "newline after prefix": [good(prefix="caption en\n"), good(prefix="caption en\r\n")],
    "reserved token": [
        good(prefix="<image>caption en"), good(prefix="<bos>caption en"), good(suffix="a dog<eos>"),
        good(suffix="<image>"),
    ],
    "label with ;": [
        good(prefix="detect dog;cat", suffix=f"{BOX} dog"),
        good(prefix="detect dog ; cat", suffix=f"{BOX} dog ; small ; {BOX} cat"),
        good(prefix="detect dog", suffix=f"{BOX} dog;small"),
    ],
    "empty label": [
        good(prefix="detect ", suffix=""), good(prefix="segment dog ;  ; cat", suffix=f"{BOX}{CODES} dog"),
        good(prefix="detect dog ;  ; cat", suffix=f"{BOX} dog"), good(prefix="detect  ; dog", suffix=f"{BOX} dog"),
    ],
    "loc tokens": [
        good(prefix="detect dog", suffix="<loc0030><loc0020><loc0010><loc0040> dog"),  # y1 < y0
        good(prefix="detect dog", suffix="<loc0010><loc0020><loc0030><loc0020> dog"),  # x1 = x0
        good(prefix="detect dog", suffix="<loc0010><loc0020><loc0030> dog"),
        good(prefix="detect dog", suffix=BOX + BOX[:9] + " dog"),
        good(prefix="detect dog", suffix="<loc0010><loc0020><loc0030><loc1024> dog"),
        good(prefix="detect dog", suffix="<loc10><loc20><loc30><loc40> dog"),
        good(prefix="detect dog", suffix="dog"),
        good(prefix="segment dog", suffix=f"{BOX} dog"),
        good(prefix="segment dog", suffix=BOX + CODES[:-8] + " dog"),
        good(prefix="segment dog", suffix=BOX + CODES.replace("007", "128") + " dog"),
        good(prefix="the dog on the left", suffix=CODES),  # RefCOCO's prompts are bare
    ],
    "form of the prompt": [
        good(prefix="Detect license plate.", suffix=f"{BOX} license plate"),
        good(prefix="detect license plate.", suffix=f"{BOX} license plate"),
        good(prefix="Segment dog", suffix=f"{BOX}{CODES} dog"), good(prefix="Detect dog", suffix=""),
        good(prefix="Caption en", suffix="a dog"), good(prefix="caption en.", suffix="a dog"),
        good(prefix="OCR", suffix="STOP"), good(prefix="Answer en what is it?", suffix="a dog"),
        {"image": "a.png", "question": "Detect dog.", "answer": f"{BOX} dog"},
    ],
    "label not asked for": [
        good(prefix="detect fracture", suffix=f"{BOX} fractured"),
        good(prefix="detect license plate", suffix=f"{BOX} Plate"),
        good(prefix="detect car ; bus", suffix=f"{BOX} car , bus"),
        good(prefix="detect car, bus", suffix=f"{BOX} car"),
        good(prefix="detect car, bus", suffix=""),
        good(prefix="detect car", suffix=f"{BOX} car ; {BOX} bus"),
        good(prefix="detect car", suffix=BOX),
        good(prefix="segment dog", suffix=f"{BOX}{CODES} cat"),
        {"image": "a.png", "question": "detect dog", "answers": [f"{BOX} dog", f"{BOX} cat"]},
    ],
    "boxes not asked for": [
        good(prefix="find the dog", suffix=f"{BOX} dog"),
        good(prefix="answer en where is the dog ?", suffix=BOX),
        good(prefix="caption en", suffix=f"{BOX} dog ; {BOX} cat"),
        good(prefix="the dog", suffix=f"{BOX}{CODES} dog"),
    ],
}  # fmt: skip
FINE = [
    good(), good(image=None), good(image=["a.png", "b.png"]), good(prefix=""), good(suffix="a ; b"),
    good(prefix="detect dog ; cat", suffix=f"{BOX} dog ; {BOX} cat"), good(prefix="detect dog", suffix=""),
    good(prefix="segment dog", suffix=f"{BOX}{CODES} dog"), good(prefix="the dog", suffix=BOX + CODES),
    good(suffix="a dog \U0001f600"), good(prefix="detect car, bus", suffix=f"{BOX} car, bus"),
    good(prefix="Describe it.", suffix="a dog"), good(prefix="answer en is it a dog.", suffix="yes"),
    good(prefix="Detect fraud in this bill: yes or no", suffix="no"),
    good(prefix="caption", suffix=f"{BOX} a dog; it sleeps"), good(prefix="answer en 1 < 2 ?", suffix="<yes>"),
]  # fmt: skip


@pytest.mark.parametrize("problem", [problem for problem, lines in BAD.items() if lines])
def test_every_problem_is_found_in_its_row_alone(folder, problem):
    """Each bad line between two good ones: named by its line, and nothing else is."""
    lines = [line for bad in BAD[problem] for line in (good(), bad)] + [good()]
    path = write_lines(folder, *lines)
    report = check(open_rows(path), show=99)
    assert report.counts == {problem: len(BAD[problem])}
    assert [found.source for found in report.first[problem]] == [
        f"{path}:{number}" for number in range(2, len(lines), 2)
    ]
    assert [found.row for found in report.first[problem]] == list(range(1, len(lines) - 1, 2))
    assert not report.ok and PROBLEMS[problem] in str(report)


def test_a_semicolon_at_the_end_is_no_form_of_the_prompt_alone(folder):
    """Training works around other forms. This one would end it, at its first drawing."""
    report = check(open_rows(write_lines(folder, good(prefix="detect dog ; ", suffix=f"{BOX} dog"))))
    assert report.counts == {"empty label": 1, "form of the prompt": 1}


def test_every_problem_has_a_test():
    elsewhere = {"box outside", "box or mask", "unreadable picture", "suffix too long", "no room"}
    elsewhere |= {"turned by EXIF", "another size", "not XML", "too many pixels"}
    assert set(PROBLEMS) == set(BAD) | elsewhere


def test_what_is_right_is_not_complained_about(folder, processor):
    report = check(open_rows(write_lines(folder, *FINE)), processor, max_length=100, open_pictures=True)
    assert report.ok and report.not_checked == [] and report.rows == len(FINE)


def test_half_a_character_is_named_with_a_tokenizer_too_and_can_be_printed(folder, processor):
    """It is neither counted nor written out, since no tokenizer and no stream takes it."""
    path = write_lines(folder, good(), good(suffix="\ud83d"), good(image="\ud83d.png"), {"\ud83d": 1})
    report = check(open_rows(path), processor)
    assert report.counts == {"half a character": 1, "missing picture": 1, "missing key": 1}
    text = str(report).encode("utf-8").decode("utf-8")
    assert f"{path}:2: '\\ud83d' stands alone in '\\ud83d'" in text
    assert "no picture at" in text and "\\ud83d.png" in text and "it has \\ud83d" in text
    with pytest.raises(RowError, match=r"my\.jsonl:2"):
        open_rows(path)[:3]


def test_bytes_that_are_no_text(folder):
    (folder / "my.jsonl").write_bytes(b'{"image": "a.png", "caption": "caf\xe9"}\n')
    report = check(open_rows(folder / "my.jsonl"))
    assert report.counts == {"not UTF-8": 1}


def test_pictures_are_opened_only_if_asked(folder):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    (folder / "text.png").write_text("no picture")
    path = write_lines(folder, good(), good(image="broken.png"), good(image=["a.png", "text.png"]))
    closed = check(open_rows(path))
    assert closed.ok and "whether pictures can be opened" in str(closed)
    report = check(open_rows(path), open_pictures=True)
    assert report.counts == {"unreadable picture": 2}
    assert [found.source for found in report.first["unreadable picture"]] == [f"{path}:2", f"{path}:3"]


def test_lengths(folder, processor):
    """Four image tokens and <bos>, prompt and newline; suffix and <eos>: counted as the processor lays them out."""
    rows = open_rows(
        write_lines(
            folder,
            good(prefix="caption en", suffix="a cat"),
            good(prefix="caption en", suffix="a cat and a dog"),
            good(image=["a.png", "b.png"], prefix="caption en", suffix="a"),
        )
    )
    sizes = [processor.lay_out([r.prefix], [len(r.pictures)], [r.suffix])["input_ids"].shape[1] for r in rows]
    report = check(rows, processor)
    assert report.longest == (max(sizes), rows[sizes.index(max(sizes))].source)
    assert report.longest_suffix == (len(processor.tokenizer.encode("a cat and a dog<eos>")), rows[1].source)
    prefix = len(processor.lay_out(["caption en"], [1])["input_ids"][0])
    short = len(processor.lay_out(["caption en"], [1], ["a cat"])["input_ids"][0])
    report = check(rows, processor, max_length=short)
    assert report.counts == {"suffix too long": 1, "no room": 1}
    assert report.first["suffix too long"][0].row == 1 and report.first["no room"][0].row == 2
    assert check(rows, processor, max_length=short - 1).counts == {"suffix too long": 2, "no room": 1}
    assert check(rows, processor, max_length=prefix).counts == {"no room": 3}
    with pytest.raises(ValueError, match="takes a processor"):
        check(rows, max_length=10)


def test_the_report_counts_rows_and_names_the_first(folder):
    path = write_lines(folder, *[good(image=f"{i}.png", suffix="") for i in range(5)], good())
    report = check(open_rows(path), show=2)
    assert report.counts == {"missing picture": 5, "empty suffix": 5} and report.bad_rows == 5
    text = str(report)
    assert "missing picture: 5 rows. paths are relative to" in text
    assert f"{path}:1: no picture at {folder / '0.png'}" in text and f"{path}:3:" not in text
    assert "... and 3 more" in text and "5 of 6 rows have a problem" in text
