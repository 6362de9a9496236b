"""One large JSON document, read one element at a time."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import good, texts

from paligemma.data import json_documents, text_files
from paligemma.data.json_documents import JsonFile
from paligemma.data.options import open_rows
from paligemma.data.rows import RowError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(texts, values | st.lists(values, max_size=5), max_size=4) | st.lists(values, max_size=5),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.booleans(),
)
def test_every_element_of_a_document_is_found_again(tmp_path_factory, document, indent, ascii_only, bom):
    path = tmp_path_factory.getbasetemp() / "x.json"
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(bom * text_files.BOM + text.encode("utf-8"))
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_documents, "BLOCK", 1)  # windows of sixteen bytes: elements are cut everywhere
        file = JsonFile(path, lambda key, element: seen.setdefault(key, []).append(element))
    arrays = {"": document} if isinstance(document, list) else document
    expected = {key: value if isinstance(value, list) else [value] for key, value in arrays.items()}
    assert seen == {key: value for key, value in expected.items() if value}
    assert {key: [file.element(key, i) for i in range(file.count(key))] for key in file.spans} == expected


@pytest.mark.parametrize("text, words", [
    ('{"a": [1, 2', "expected , or ], found its end"),
    ('{"a": [1 2]}', "expected , or ], found 2 at byte 10"),
    ('{"a": [nope]}', "Expecting value at byte 8"),
    ('{"a": ["x]}', "Unterminated string"),
    ('{"a" 1}', "expected :, found 1 at byte 6"),
    ('{"a": 1} {"b": 2}', "more than one document at byte 10"),
    ("[" * 100_000, "nested too deeply"),
    ('{"a": [' + '"x", ' * 50_000 + "nope]}", "Expecting value at byte 250008"),
])  # fmt: skip
def test_a_broken_document_is_refused_with_the_place(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="is not JSON") as error:
        JsonFile(tmp_path / "x.json")
    assert words in str(error.value)


def test_a_list_of_records(folder):
    table = [good(), {"image": "b.png", "question": "where ?", "answers": ["here", "there", "there"]}, 3]
    for document in (table, {"data": table, "version": 1}):
        (folder / "x.json").write_text(json.dumps(document, indent=2))
        rows = open_rows(folder / "x.json")
        assert (rows.kind, len(rows)) == ("json", 3)
        assert (rows[1].image, rows[1].prefix, rows[1].suffix) == (
            str(folder / "b.png"), "answer en where ?", "there",
        )  # fmt: skip
        with pytest.raises(RowError, match=r"\[2\]: expected an object, got 3"):
            rows[2]
