"""The layout of a row, token by token: against drawn examples, the official vectors, and transformers' processor."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tokenizer import LOCATIONS, SEGMENTS, build_sentencepiece, build_tokenizer
from PIL import Image

from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenizer import Tokenizer, check_tokenizer, load_tokenizer

N, SIZE = 4, 28  # tokens per image, side of an image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
OTHER = Image.new("RGB", (9, 50), "teal")
DOT = Image.new("RGB", (1, 1), "white")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def processor(tokenizer) -> PaliGemmaProcessor:
    return PaliGemmaProcessor(tokenizer, N, SIZE)


def transformers_tokenizer(folder: Path):
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)


@pytest.fixture(scope="module")
def reference(folder):
    """transformers' own processor on the same vocabulary, with its PIL image path."""
    from transformers import PaliGemmaProcessor as ReferenceProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    images.image_seq_length = N
    return ReferenceProcessor(images, transformers_tokenizer(folder))


# ------------------------------------------------------------------------------------------------------- the layout


def test_the_layout_of_a_row(tokenizer, processor):
    inputs = processor("caption en", PICTURE, suffix="a cat")
    image, bos, eos, newline = (getattr(tokenizer, f"{name}_token_id") for name in ("image", "bos", "eos", "newline"))
    caption_en, a_cat = tokenizer.encode("caption en"), tokenizer.encode("a cat")
    assert len(caption_en) == len(a_cat) == 2
    assert inputs["input_ids"].tolist() == [[image] * 4 + [bos, *caption_en, newline, *a_cat, eos]]
    assert inputs["token_type_ids"].tolist() == [[0] * 8 + [1] * 3]
    assert inputs["attention_mask"].tolist() == [[1] * 11]
    assert inputs["labels"].tolist() == [[-100] * 8 + [*a_cat, eos]]
    assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE) and inputs["pixel_values"].dtype == torch.float32
    assert all(inputs[name].dtype == torch.int64 for name in inputs if name != "pixel_values")


def test_without_a_suffix_everything_is_prefix_and_there_are_no_labels(processor):
    inputs = processor("caption en", PICTURE)
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids", "pixel_values"}
    assert inputs["token_type_ids"].sum() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_unattended_untrained_and_of_type_zero(tokenizer, processor, side):
    inputs = processor(["answer en what is it", "ocr"], [PICTURE, OTHER], suffix=["a cat", ""], padding_side=side)
    pad = inputs["attention_mask"] == 0
    assert pad.any(dim=1).tolist() == [False, True]
    assert pad[1, 0].item() == (side == "left") and pad[1, -1].item() == (side == "right")
    assert (inputs["input_ids"][pad] == tokenizer.pad_token_id).all()
    assert (inputs["token_type_ids"][pad] == 0).all() and (inputs["labels"][pad] == -100).all()
    # An empty suffix is trained too: to say nothing, which is the eos alone.
    assert inputs["labels"][1][inputs["labels"][1] != -100].tolist() == [tokenizer.eos_token_id]


def test_a_row_is_the_same_alone_and_in_a_batch(processor):
    prompts, images = ["caption en", "answer en how many dogs are there", ""], [PICTURE, OTHER, PICTURE]
    batch = processor(prompts, images)
    for row in range(3):
        alone = processor(prompts[row], images[row])
        keep = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][keep], alone["input_ids"][0])
        assert torch.equal(batch["pixel_values"][row], alone["pixel_values"][0])


def test_several_images_stand_before_one_bos(tokenizer, processor):
    inputs = processor(["answer en which"], [(PICTURE, OTHER)])
    ids = inputs["input_ids"][0].tolist()
    assert ids[: 2 * N + 1] == [tokenizer.image_token_id] * 2 * N + [tokenizer.bos_token_id]
    assert inputs["pixel_values"].shape[0] == 2
    for same in ((PICTURE, OTHER), [[PICTURE, OTHER]]):  # a tuple for one prompt; a list in a list
        assert torch.equal(processor("answer en which", same)["pixel_values"], inputs["pixel_values"])


def test_rows_may_see_different_numbers_of_images(tokenizer, processor):
    inputs = processor(["ocr", "ocr"], [PICTURE, (OTHER, PICTURE)])
    assert (inputs["input_ids"] == tokenizer.image_token_id).sum(dim=1).tolist() == [N, 2 * N]
    one, two, three = inputs["pixel_values"]
    assert torch.equal(one, three) and not torch.equal(one, two)


def test_without_images_there_are_no_pixels(tokenizer, processor):
    inputs = processor(["caption en"], None)
    assert "pixel_values" not in inputs
    assert inputs["input_ids"][0].tolist() == [tokenizer.bos_token_id, *tokenizer.encode("caption en\n")]


def test_images_come_in_every_form_and_upright(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    PICTURE.save(tmp_path / "x.png", exif=exif)
    upright = PICTURE.transpose(Image.Transpose.ROTATE_180)
    for source in (tmp_path / "x.png", str(tmp_path / "x.png"), Image.open(tmp_path / "x.png"), np.asarray(upright)):
        assert torch.equal(processor("ocr", source)["pixel_values"], processor("ocr", upright)["pixel_values"])


# ------------------------------------------------------------------------------------------- prompts with traps in them


def test_a_newline_at_the_end_becomes_the_token_of_two(tokenizer, processor):
    """As in transformers. big_vision would give the token of one newline twice."""
    ids = processor("caption en\n", PICTURE)["input_ids"][0].tolist()
    (double,) = tokenizer.encode("\n\n")
    assert ids[-1] == double != tokenizer.newline_token_id
    assert tokenizer.newline_token_id not in ids


def test_nothing_is_stripped(tokenizer, processor):
    (caption,), (space_caption,) = tokenizer.encode("caption"), tokenizer.encode(" caption")
    assert caption != space_caption
    assert caption in processor("caption en", PICTURE)["input_ids"]
    assert space_caption in processor("<image> caption en", PICTURE)["input_ids"]


def test_an_image_placeholder_at_the_start_changes_nothing(processor):
    for prompt, images in (("<image>caption en", PICTURE), ("<image><image>caption en", (PICTURE, OTHER))):
        with_placeholder, without = processor(prompt, images), processor("caption en", images)
        assert torch.equal(with_placeholder["input_ids"], without["input_ids"])


def test_bos_follows_the_last_placeholder(tokenizer, processor):
    ids = processor("dog<image>cat<image>cow", (PICTURE, OTHER))["input_ids"][0].tolist()
    image, bos = [tokenizer.image_token_id] * N, tokenizer.bos_token_id
    assert ids == [
        *tokenizer.encode("dog"), *image, *tokenizer.encode("cat"), *image, bos, *tokenizer.encode("cow\n")
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ equal to transformers

PROMPTS = [
    "caption en",
    "",
    " ",
    "\n",
    "caption en\n",
    "caption en\n\n\n",
    " caption en ",
    "answer en where is the cow standing?",
    "detect cat ; dog",
    "Ünïcode 象 \U0001f992 é\u200d",
    "x  y\tz",
    "12 apples, 345 pears",
    "<loc0001><loc1023> <seg000> <loc1024> <loc00> <seg128>",
    "<bos>caption en<eos>",
    "<pad><unk><mask>",
    "<image",
    "a" * 300,
]


def same_as(reference, processor, prompts, images, suffix, side) -> None:
    theirs = reference(text=list(prompts), images=images, suffix=suffix, padding=True, padding_side=side)
    ours = processor(list(prompts), [tuple(row) for row in images], suffix=suffix, padding_side=side)
    for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        if name == "labels" and suffix is None:
            assert name not in ours  # theirs are all -100, and the loss of that is nan
            continue
        assert ours[name].tolist() == np.asarray(theirs[name]).tolist(), name
    assert np.array_equal(ours["pixel_values"].numpy(), np.stack(theirs["pixel_values"]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("trained", [True, False], ids=["suffix", "no suffix"])
def test_batches_equal_the_reference(reference, processor, side, trained):
    suffix = [PROMPTS[-1 - i] for i in range(len(PROMPTS))] if trained else None
    same_as(reference, processor, PROMPTS, [[PICTURE]] * len(PROMPTS), suffix, side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_one_and_two_images_equal_the_reference(reference, processor, side):
    images = [[PICTURE, OTHER], [OTHER], [OTHER, PICTURE]]
    same_as(reference, processor, ["ocr", "answer en which dog", ""], images, ["a", "", "the dog"], side)


@pytest.mark.parametrize(
    "prompt, count",
    [
        ("<image>caption en", 1),
        ("<image> caption en", 1),
        ("<image>\ncaption en", 1),
        ("<image><image>caption en", 2),
        ("caption<image>en", 1),
        ("caption en<image>", 1),
        ("<image>a<image>\n", 2),
        ("<image><bos>caption en\n", 1),
    ],
)
def test_prompts_with_placeholders_equal_the_reference(reference, processor, prompt, count):
    same_as(reference, processor, [prompt], [[PICTURE, OTHER][:count]], ["a cat"], "left")


# Text as people and models write it, with what the vocabulary treats apart mixed in.
PIECES = ["<bos>", "<eos>", "<pad>", "<loc0007>", "<seg127>", "<loc9999>", "<image", "\n", "\n\n", " ", "  ", "\t", "▁"]
TEXTS = st.lists(st.sampled_from([*PIECES, "dog"]) | st.text(max_size=8), max_size=8).map("".join)
TEXTS = TEXTS.filter(lambda text: "<image>" not in text)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), side=st.sampled_from(["left", "right"]))
def test_any_text_equals_the_reference(reference, processor, rows, side):
    prompts, suffixes = zip(*rows)
    same_as(reference, processor, prompts, [[DOT]] * len(rows), list(suffixes), side)


# ------------------------------------------------------------------------------------------------- the official ids


def official_backend(image_first: bool = False) -> tokenizers.Tokenizer:
    """A vocabulary of the official size with the official ids of a few words, and fillers everywhere else.

    `image_first`: what becomes of a plain Gemma tokenizer when `<image>` is added to it before the others.
    """
    words = {"<unk>": 3, "<mask>": 4, "▁en": 659, "caption": 21209, "a": 235250, "▁cat": 4401}
    ids = words | {"<pad>": 0, "<eos>": 1, "<bos>": 2, "\n": 108}
    added = ["<image>", *LOCATIONS, *SEGMENTS] if image_first else [*LOCATIONS, *SEGMENTS, "<image>"]
    token_at = {i: token for token, i in ids.items()} | dict(enumerate(added, 256000))
    vocab = {token_at.get(i, f"filler {i}"): i for i in range(257153)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", ignore_merges=True))
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>", "<image>"])
    backend.add_tokens(["\n", *LOCATIONS, *SEGMENTS])
    return backend


@pytest.fixture(scope="module")
def official_ids() -> Tokenizer:
    return Tokenizer(official_backend())


def test_the_official_vector(official_ids):
    inputs = PaliGemmaProcessor(official_ids, 4, SIZE)("caption en", PICTURE, suffix="a cat")
    assert inputs["input_ids"].tolist() == [[257152] * 4 + [2, 21209, 659, 108] + [235250, 4401, 1]]
    assert inputs["token_type_ids"].tolist() == [[0] * 8 + [1] * 3]
    assert inputs["labels"].tolist() == [[-100] * 8 + [235250, 4401, 1]]


OFFICIAL_CONFIG = SimpleNamespace(
    image_token_index=257152,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=1,
    text_config=SimpleNamespace(vocab_size=257216),
)


def test_the_official_tokenizer_fits_the_official_configurations(official_ids):
    check_tokenizer(official_ids, OFFICIAL_CONFIG)
    # big_vision's embedding has no row for <image>, which is never looked up.
    big_vision = vars(OFFICIAL_CONFIG) | {"text_config": SimpleNamespace(vocab_size=257152)}
    check_tokenizer(official_ids, SimpleNamespace(**big_vision))


@pytest.mark.official
@pytest.mark.skipif("GEMMA_TOKENIZER" not in os.environ, reason="set GEMMA_TOKENIZER to a tokenizer.json or .model")
def test_the_real_vocabulary():
    """With the real vocabulary, which does not ship here: the file of any Gemma 1, Gemma 2 or PaliGemma checkpoint."""
    path = Path(os.environ["GEMMA_TOKENIZER"])
    if path.suffix == ".json":
        backend = tokenizers.Tokenizer.from_file(str(path))
        if backend.token_to_id("<loc0000>") is None:
            backend.add_tokens([*LOCATIONS, *SEGMENTS])
            backend.add_special_tokens(["<image>"])
        tokenizer = Tokenizer(backend)
    else:
        tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, OFFICIAL_CONFIG)
    vectors = {
        "caption en\n": [21209, 659, 108],
        "describe en\n": [15019, 659, 108],
        "ocr\n": [120185, 108],
        "segment cat\n": [32318, 4401, 108],
        "detect cat ; dog\n": [39208, 4401, 2161, 5929, 108],
        "answer en where is the cow standing?\n": [13072, 659, 1570, 603, 573, 13910, 9980, 235336, 108],
        "answer en How many coins? 123\n": [13072, 659, 2250, 1767, 22799, 235336, 235248, 235274, 235284, 235304, 108],
        " caption en\n": [43770, 659, 108],
        "caption en\n\n": [21209, 659, 109],
        "<loc0256><loc0128><loc0768><loc0512> cat ; <loc0100><loc0200><loc0300><loc0400> dog": [
            256256, 256128, 256768, 256512, 4401, 2161, 235248, 256100, 256200, 256300, 256400, 5929
        ],
        "x  y\tz\n": [235297, 139, 235267, 226, 235306, 108],
    }  # fmt: skip
    for text, ids in vectors.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    inputs = PaliGemmaProcessor(tokenizer, 4, SIZE)("caption en", PICTURE, suffix="a cat")
    assert inputs["input_ids"].tolist() == [[257152] * 4 + [2, 21209, 659, 108, 235250, 4401, 1]]


# ---------------------------------------------------------------------------------------------------- the tokenizer


def test_the_attributes_of_a_tokenizer(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.encode("\n") == [tokenizer.newline_token_id]
    assert tokenizer.encode("<loc0000><loc1023>") == [tokenizer.first_loc_id, tokenizer.first_loc_id + 1023]
    assert tokenizer.encode("<seg000><seg127>") == [tokenizer.first_seg_id, tokenizer.first_seg_id + 127]
    assert tokenizer.encode("<image>") == [tokenizer.image_token_id] == [len(tokenizer) - 1]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_encoding_and_decoding_equal_transformers(tokenizer, reference, text):
    ids = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == reference.tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_decoding_any_ids_equals_transformers(tokenizer, reference, data):
    """Bytes that are not UTF-8 among them: models write such things."""
    byte = st.integers(*(tokenizer.token_to_id(f"<0x{b}>") for b in ("00", "FF")))
    ids = data.draw(st.lists(byte | st.integers(0, len(tokenizer) - 1), max_size=20))
    assert tokenizer.decode(ids) == reference.tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_text_survives_encoding(tokenizer, text):
    """Whatever the language, thanks to byte fallback; only U+2581, which stands for a space, comes back as one."""
    specials = ("<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<image>")
    if not any(special in text for special in specials):
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_decoding_keeps_loc_and_seg_and_drops_the_frame(tokenizer):
    ids = tokenizer.encode("<pad><bos><loc0001><seg002> dog<eos><image>")
    assert tokenizer.decode(ids) == "<loc0001><seg002> dog"
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(np.array(ids)) == tokenizer.decode(ids)
    assert tokenizer.decode([-100, *ids, len(tokenizer) + 7]) == "<loc0001><seg002> dog"
    assert tokenizer.decode([]) == ""


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stable_text_is_never_taken_back(tokenizer, data):
    byte = st.integers(*(tokenizer.token_to_id(f"<0x{b}>") for b in ("00", "FF")))
    written = st.text(alphabet="ab ä象🦒", max_size=4).map(tokenizer.encode)
    chunks = data.draw(st.lists(written | st.lists(byte | st.integers(0, len(tokenizer) - 1), max_size=3), max_size=8))
    ids = [i for chunk in chunks for i in chunk]
    shown = ""
    for end in range(len(ids) + 1):
        stable = tokenizer.decode_stable(ids[:end])
        assert stable.startswith(shown) and tokenizer.decode(ids[:end]).startswith(stable)
        shown = stable
    assert tokenizer.decode(ids).startswith(shown)


def test_stable_text_waits_for_whole_characters(tokenizer):
    ids = tokenizer.encode("a象b")
    assert len(ids) == 5  # the character is three bytes
    assert [tokenizer.decode_stable(ids[:end]) for end in range(6)] == ["", "a", "a", "a", "a", "a象b"]


def test_a_transformers_tokenizer_will_do(folder, processor):
    theirs = transformers_tokenizer(folder)
    theirs(["one", "two words"], padding="max_length", max_length=7, truncation=True)  # leaves its backend set to that
    ours = PaliGemmaProcessor(theirs, N, SIZE)("caption en of the largest dog", PICTURE, suffix="a cat")
    expected = processor("caption en of the largest dog", PICTURE, suffix="a cat")
    assert torch.equal(ours["input_ids"], expected["input_ids"])
    assert theirs(["one"], padding="max_length", max_length=7, truncation=True)["attention_mask"] == [[1] + [0] * 6]
    with pytest.raises(TypeError, match="load_tokenizer"):
        PaliGemmaProcessor(object(), N, SIZE)


def test_truncation_and_padding_saved_in_a_file_are_ignored(folder, tokenizer, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=30)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("detect dog ; cat") == tokenizer.encode("detect dog ; cat")


# --------------------------------------------------------------------------------------- tokenizers that do not fit


def edited(folder: Path, target: Path, edit) -> Path:
    """tokenizer.json of `folder`, its content changed by `edit`, in `target`."""
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content)
    (target / "tokenizer.json").write_text(json.dumps(content))
    return target


def test_one_token_at_a_wrong_place_says_nothing_of_plain_gemma(tmp_path):
    build_tokenizer(tmp_path)

    def swapped(content):
        a, b = (next(t for t in content["added_tokens"] if t["content"] == name) for name in ("<loc0007>", "<loc0008>"))
        a["id"], b["id"] = b["id"], a["id"]
        vocab = content["model"]["vocab"]
        if "<loc0007>" in vocab:
            vocab["<loc0007>"], vocab["<loc0008>"] = vocab["<loc0008>"], vocab["<loc0007>"]

    (tmp_path / "edited").mkdir()
    with pytest.raises(ValueError, match="'<loc0007>' has id") as caught:
        load_tokenizer(edited(tmp_path, tmp_path / "edited", swapped))
    assert "plain Gemma" not in str(caught.value)


def test_a_tokenizer_without_loc_tokens(tmp_path):
    build_tokenizer(tmp_path, locations=False)
    with pytest.raises(ValueError, match=r"'<loc0000>' is missing; '<seg000>' is missing.*plain Gemma") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_without_image_token(tmp_path):
    with pytest.raises(ValueError, match="'<image>' is missing"):
        load_tokenizer(build_tokenizer(tmp_path, image_token=False))


def test_an_image_token_that_text_cannot_reach(folder, tmp_path):
    """In the vocabulary, but not marked as a whole token: text spells it out."""

    def unmark(content):
        content["model"]["vocab"]["<image>"] = 1928
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]

    with pytest.raises(ValueError, match=r"'<image>' is split into \d tokens"):
        load_tokenizer(edited(folder, tmp_path, unmark))


def test_a_gap_among_the_loc_tokens(folder, tmp_path):
    def rename(content):
        content["model"]["vocab"]["filler"] = content["model"]["vocab"].pop("<loc0500>")
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<loc0500>"]

    with pytest.raises(ValueError, match="'<loc0500>' is missing, expected 1276"):
        load_tokenizer(edited(folder, tmp_path, rename))


def test_loc_tokens_in_another_order(folder, tmp_path):
    def swap(content):
        ids = content["model"]["vocab"]
        ids["<seg003>"], ids["<seg004>"] = ids["<seg004>"], ids["<seg003>"]
        for token in content["added_tokens"]:
            token["id"] = ids.get(token["content"], token["id"])
        content["added_tokens"].sort(key=lambda token: token["id"])

    with pytest.raises(ValueError, match="'<seg003>' has id 1804, expected 1803"):
        load_tokenizer(edited(folder, tmp_path, swap))


def test_a_newline_that_is_no_token(folder, tmp_path):
    def drop(content):
        content["model"]["vocab"]["filler"] = content["model"]["vocab"].pop("\n")
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "\n"]

    with pytest.raises(ValueError, match=r"'\\n' is missing"):
        load_tokenizer(edited(folder, tmp_path, drop))


def test_loc_tokens_that_are_only_in_the_vocabulary_are_marked_as_whole(folder, tokenizer, tmp_path):
    """Otherwise <loc0001> would be spelt out; transformers' processor marks them too."""

    def unmark(content):
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"][:4] not in ("<loc", "<seg")]

    assert load_tokenizer(edited(folder, tmp_path, unmark)).encode("<loc0001> dog") == tokenizer.encode("<loc0001> dog")


def test_loc_tokens_that_are_marked_special_are_still_decoded(folder, tmp_path):
    def special(content):
        for token in content["added_tokens"]:
            token["special"] = True

    tokenizer = load_tokenizer(edited(folder, tmp_path, special))
    assert tokenizer.decode(tokenizer.encode("<bos><loc0001><seg002> dog")) == "<loc0001><seg002> dog"


def test_ids_of_the_official_vocabulary_that_are_shifted_by_one():
    with pytest.raises(ValueError) as caught:
        Tokenizer(official_backend(image_first=True))
    message = str(caught.value)
    assert "'<loc0000>' has id 256001, expected 256000" in message
    assert "'<seg000>' has id 257025, expected 257024" in message
    assert "'<image>' has id 256000, expected 257152" in message
    assert "plain Gemma" in message and "\n" not in message


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image_token_index": 1927}, "'<image>' has id 1928, expected 1927"),
        ({"eos_token_id": 7}, "'<eos>' has id 1, expected 7"),
        ({"bos_token_id": 7, "pad_token_id": 8}, "'<pad>' has id 0, expected 8; '<bos>' has id 2, expected 7"),
        ({"text_config": SimpleNamespace(vocab_size=1927)}, "1929 tokens, the model's embedding only 1927 rows"),
    ],
)
def test_a_tokenizer_of_another_model(tokenizer, change, words):
    fitting = vars(OFFICIAL_CONFIG) | {"image_token_index": 1928, "text_config": SimpleNamespace(vocab_size=1984)}
    check_tokenizer(tokenizer, SimpleNamespace(**fitting))
    with pytest.raises(ValueError, match=words):
        check_tokenizer(tokenizer, SimpleNamespace(**fitting | change))


def test_tokenizer_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)
    for content in ("", "{", "[]", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json that can be read"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "part, value, words",
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "precompiled_charsmap"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "chunk size must be non-zero"),
        ("model", {"type": "WordLevel", "unk_token": "?", "vocab": {}}, "WordLevel error: Missing"),
    ],
)
def test_what_the_library_raises_at_a_broken_file_becomes_a_value_error(folder, tmp_path, part, value, words):
    """Its errors are bare Exceptions, and where it panics no Exceptions at all: they would pass every `except`."""
    edited(folder, tmp_path, lambda content: content.update({part: value}))
    with pytest.raises(ValueError, match=rf"(not understood|the tokenizer cannot encode this text): .*{words}"):
        load_tokenizer(tmp_path).encode("caption en")


def test_a_pipe_or_a_device_is_no_tokenizer(tmp_path):
    """It would be waited for, or read, for ever."""
    os.mkfifo(tmp_path / "tokenizer.json")
    for path in (tmp_path / "tokenizer.json", Path("/dev/zero")):
        with pytest.raises(ValueError, match="no ordinary file"):
            load_tokenizer(path)


# ---------------------------------------------------------------------------------------------------- sentencepiece


@pytest.fixture(scope="module", params=[True, False], ids=["PaliGemma's", "Gemma's"])
def model_file(request, tmp_path_factory) -> Path:
    return build_sentencepiece(tmp_path_factory.mktemp("sp"), locations=request.param) / "tokenizer.model"


def test_sentencepiece_ids_are_kept_and_image_is_last(model_file):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = load_tokenizer(model_file)
    had_loc = model.piece_to_id("<loc0000>") != model.unk_id()
    tab = model.piece_to_id("<0x09>")  # named "\t" on our side
    assert all(tokenizer.token_to_id(model.id_to_piece(i)) == i for i in range(len(model)) if i != tab)
    assert len(tokenizer) == len(model) + 1 + (0 if had_loc else 1024 + 128)
    assert tokenizer.image_token_id == len(tokenizer) - 1
    if not had_loc:  # the order matters: loc, seg, image
        assert (tokenizer.first_loc_id, tokenizer.first_seg_id) == (len(model), len(model) + 1024)


@pytest.fixture(scope="module")
def sentencepiece_pair(tmp_path_factory):
    import sentencepiece

    folder = build_sentencepiece(tmp_path_factory.mktemp("sp"))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), load_tokenizer(folder)


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.sampled_from([*PIECES[3:], *"abcdeghinorst", " the ", "cat "]) | st.text(max_size=5)).map("".join)
)
def test_sentencepiece_and_ours_split_alike(sentencepiece_pair, text):
    """Control tokens apart: sentencepiece spells a typed "<bos>" out, we and transformers do not."""
    model, tokenizer = sentencepiece_pair
    if not any(name in text for name in ("<bos>", "<eos>", "<pad>", "<unk>", "<image>")):
        assert tokenizer.encode(text) == model.encode(text)
        assert tokenizer.decode(model.encode(text)) == model.decode(model.encode(text))


def test_without_sentencepiece_the_way_out_is_named(model_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"paligemma\[bigvision\]"):
        load_tokenizer(model_file)


def test_sentencepiece_models_of_another_kind(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat and a dog sat on the mat"] * 9), model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe", vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="in another way than Gemma's"):
        load_tokenizer(tmp_path)  # it puts a space in front of everything
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_is_preferred(folder, tmp_path):
    build_sentencepiece(tmp_path)
    build_tokenizer(tmp_path)
    assert len(load_tokenizer(tmp_path)) == 1929


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "text, images, suffix, words",
    [
        ([], [], None, "no prompt"),
        (["a", "b"], [PICTURE], None, "2 prompts and images for 1 rows"),
        (["a", "b"], PICTURE, None, "2 prompts and images for 1 rows"),
        ("a", [PICTURE, OTHER], None, "1 prompts and images for 2 rows"),
        (["a", "b"], (PICTURE, OTHER), None, "a tuple of images is one row"),
        (["a", "b"], [PICTURE, None], None, "row 1 has no image"),
        (["a", "b"], [PICTURE, ()], None, "row 1 has no image"),
        (["a", "b<image>c<image>"], [PICTURE, PICTURE], None, "row 1 has <image> 2 times and comes with 1 images"),
        (["<image>a"], [(PICTURE, PICTURE)], None, "row 0 has <image> 1 times and comes with 2 images"),
        (["<image>a"], None, None, "row 0 has <image> 1 times and comes with 0 images"),
        (["a", "b"], [PICTURE, PICTURE], ["x"], "2 prompts and 1 suffixes"),
        (["a", "b"], [PICTURE, PICTURE], ["x", None], "suffix of row 1 is None"),
        (["a"], [PICTURE], ["an <image>"], "suffix of row 0 contains <image>"),
        (["a\udcff"], [PICTURE], None, "Unicode"),
    ],
)  # fmt: skip
def test_bad_input(processor, text, images, suffix, words):
    with pytest.raises(ValueError, match=words) as caught:
        processor(text, images, suffix=suffix)
    assert "\n" not in str(caught.value)


def test_a_prompt_that_is_no_text(processor):
    with pytest.raises(TypeError, match="prompt of row 1 is NoneType"):
        processor(["a", None], [PICTURE, PICTURE])


def test_a_bad_padding_side(processor):
    with pytest.raises(ValueError, match="'middle', expected 'left' or 'right'"):
        processor("a", PICTURE, padding_side="middle")


@pytest.mark.parametrize("arguments", [(0, 28), (4, -1), (4.0, 28), (4, None)])
def test_bad_sizes(tokenizer, arguments):
    with pytest.raises(ValueError, match="expected a positive whole number"):
        PaliGemmaProcessor(tokenizer, *arguments)


# ---------------------------------------------------------------------------------------------------- cutting long rows


def test_max_length_cuts_the_end_of_the_suffix_and_says_so(processor):
    prompts, images, suffixes = ["ocr", "ocr"], [PICTURE, OTHER], ["a cat and a dog and a cow", "no"]
    whole = processor(prompts, images, suffix=suffixes, padding_side="right")
    with pytest.warns(UserWarning, match="1 of 2 suffixes were cut to max_length=10.*row 0 lost most, 6 tokens"):
        cut = processor(prompts, images, suffix=suffixes, padding_side="right", max_length=10)
    for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        assert torch.equal(cut[name], whole[name][:, :10])


def test_max_length_leaves_short_rows_alone_and_never_cuts_a_prompt(processor, recwarn):
    whole = processor("ocr", PICTURE, suffix="a cat")
    length = whole["input_ids"].shape[1]
    assert torch.equal(processor("ocr", PICTURE, suffix="a cat", max_length=length)["labels"], whole["labels"])
    assert not recwarn
    with pytest.raises(ValueError, match="row 0 has 7 tokens of images and prompt, which are never cut"):
        processor("ocr", PICTURE, suffix="a cat", max_length=7)
    with pytest.raises(ValueError, match=r"max_length is 99.5, expected a whole number of at least 1"):
        processor("ocr", PICTURE, suffix="a cat", max_length=99.5)
    with pytest.raises(ValueError, match="max_length is 5"):
        processor("ocr", PICTURE, max_length=5)


# ---------------------------------------------------------------------------------------------------- to and from disk


def test_saved_and_loaded_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert (again.num_image_tokens, again.image_size) == (N, SIZE)
    text, suffix = ["  <loc0007>é\n", "x"], ["\n\n象", "<seg001>"]
    first, second = (p(text, [PICTURE, OTHER], suffix=suffix) for p in (processor, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_number_of_image_tokens_is_saved_with_the_size(tokenizer, tmp_path):
    PaliGemmaProcessor(tokenizer, 64, 128).save_pretrained(tmp_path)  # patches of 16 pixels, where the usual are of 14
    again = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert (again.num_image_tokens, again.image_size) == (64, 128)


def test_transformers_loads_what_we_save(processor, tmp_path):
    from transformers import AutoProcessor, AutoTokenizer

    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma"}))
    theirs = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(theirs).__name__ == "PaliGemmaProcessor"
    same_as(theirs, processor, PROMPTS, [[PICTURE]] * len(PROMPTS), PROMPTS, "left")
    assert len(theirs.tokenizer) == len(processor.tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).image_token_id == processor.tokenizer.image_token_id


def test_what_transformers_saves_we_load(reference, processor, tmp_path):
    reference.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()  # newer releases write processor_config.json
    ours = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert (ours.num_image_tokens, ours.image_size) == (N, SIZE)
    assert torch.equal(ours(PROMPTS[7], PICTURE)["input_ids"], processor(PROMPTS[7], PICTURE)["input_ids"])


def test_a_sentencepiece_tokenizer_is_saved_as_tokenizer_json(model_file, tmp_path):
    tokenizer = load_tokenizer(model_file)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "detect <loc0007> strawberry 12\n\n  象<bos>"
    assert again.encode(text) == tokenizer.encode(text) and len(again) == len(tokenizer)


@pytest.mark.parametrize("vision, expected", [({"image_size": 448, "patch_size": 14}, (1024, 448)), ({}, (256, 224))])
def test_config_json_is_enough(folder, tmp_path, vision, expected):
    build_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision}))
    processor = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert (processor.num_image_tokens, processor.image_size) == expected


def test_an_official_preprocessor_config(tmp_path):
    build_tokenizer(tmp_path)
    official = {
        "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_processor_type": "SiglipImageProcessor", "image_seq_length": 1024,
        "image_std": [0.5, 0.5, 0.5], "processor_class": "PaliGemmaProcessor", "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"height": 448, "width": 448},
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(official))
    processor = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert (processor.num_image_tokens, processor.image_size) == (1024, 448)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "preprocessor_config.json is not JSON"),
        ("[" * 100_000, "preprocessor_config.json is not JSON"),
        ("[1]", "holds list"),
        ('{"size": {"height": 224, "width": 336}}', "expected equal height and width"),
        ('{"size": {"shortest_edge": 224}}', "expected equal height and width"),
        ('{"size": 224, "resample": 2}', "resample is 2"),
        ('{"size": 224, "image_mean": [0.48, 0.45, 0.40]}', "image_mean"),
        ('{"size": 224, "do_resize": false}', "do_resize is False"),
        ('{"size": 224, "rescale_factor": 1}', "rescale_factor is 1"),
        ('{"size": 224, "image_seq_length": "many"}', "preprocessor_config.json: image_seq_length is 'many'"),
    ],
)
def test_preprocessor_configs_that_mean_something_else(tmp_path, content, words):
    build_tokenizer(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        PaliGemmaProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("preprocessor_config.json", {"rescale_factor": "x"}, r"preprocessor_config\.json: rescale_factor is 'x'"),
        ("preprocessor_config.json", {"rescale_factor": [1]}, r"rescale_factor is \[1\]"),
        ("preprocessor_config.json", {"image_mean": "0.5" * 999}, r"image_mean is '0\.5.{,40}'; PaliGemma's"),
        ("preprocessor_config.json", {"size": {"height": [28], "width": [28]}}, "expected equal height and width"),
        ("preprocessor_config.json", {"size": 0}, "size of the images is 0"),
        ("preprocessor_config.json", {"size": True}, "size of the images is True"),
        ("preprocessor_config.json", {"size": 2**40}, "size of the images is 1099511627776"),
        (
            "preprocessor_config.json",
            {"size": 28, "image_seq_length": [4]},
            r"preprocessor_config\.json: image_seq_length is \[4\]",
        ),
        ("processor_config.json", {"image_processor": "x"}, r"processor_config\.json: image_processor is 'x'"),
        ("processor_config.json", {"image_processor": [1, 2]}, "expected an object"),
        ("config.json", {"vision_config": "x"}, r"config\.json: vision_config is 'x', expected an object"),
        ("config.json", {"vision_config": {"patch_size": "x"}}, r"config\.json: patch_size is 'x'"),
        ("config.json", {"vision_config": {"patch_size": 0}}, r"config\.json: patch_size is 0"),
        ("config.json", {"vision_config": {"image_size": "x"}}, "size of the images is 'x'"),
    ],
)
def test_hostile_settings_are_refused_by_their_key(tmp_path, name, content, words):
    build_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as caught:
        PaliGemmaProcessor.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 400


def test_the_number_of_image_tokens_follows_from_the_sizes_of_image_and_patch(tmp_path):
    build_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"image_size": 160, "patch_size": 16}}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 160, "image_seq_length": 7}))
    message = r"preprocessor_config\.json: image_seq_length is 7, expected the number of patches: 100 at 160 pixels"
    with pytest.raises(ValueError, match=message):
        PaliGemmaProcessor.from_pretrained(tmp_path)


def test_a_folder_without_any_settings(tmp_path):
    build_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither preprocessor_config\.json nor a config\.json"):
        PaliGemmaProcessor.from_pretrained(tmp_path)


def test_a_disk_that_fills_while_saving_leaves_the_old_files_whole(processor, tmp_path, monkeypatch):
    processor.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_text = Path.write_text

    def write_until_full(self, text, **options):
        if "preprocessor_config" in self.name:
            write_text(self, text[:10], **options)
            raise OSError(28, "No space left on device")
        return write_text(self, text, **options)

    monkeypatch.setattr(Path, "write_text", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        PaliGemmaProcessor(processor.tokenizer, 9, 42).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
