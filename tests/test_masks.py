"""Who may look at whom: the drawings, the rules, and what they do to the logits."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import make_inputs, randomize, tiny_config

from paligemma import attention_mask, kv_cache
from paligemma.attention_mask import cached_mask, positions, prefix_lm_mask, token_types_from_labels
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration

# ---------------------------------------------------------------------------------------------- the drawings


def drawings():
    """Every picture of `attention_mask.py`: (letters of the columns, rows of 0 and 1, the window named above it)."""
    found = []
    for block in re.findall(r"((?:^ {4}[ip.s ](?: +[ips.01])+\n)+)", attention_mask.__doc__, re.MULTILINE):
        header, *rows = block.splitlines()
        letters = header.split()
        assert [row.split()[0] for row in rows] == letters, "rows and columns of a drawing are the same tokens"
        before = attention_mask.__doc__[: attention_mask.__doc__.index(block)].rstrip().splitlines()[-1]
        window = re.search(r"window of (\d+):", before)
        picture = [[bool(int(digit)) for digit in row.split()[1:]] for row in rows]
        found.append((letters, picture, int(window[1]) if window else None))
    return found


def test_the_drawn_masks():
    assert [("".join(letters), window) for letters, _, window in drawings()] == [
        ("iippsss", None),
        (".ipss", None),
        ("iippsss", 3),
    ]
    for letters, picture, window in drawings():
        types = torch.tensor([[int(letter == "s") for letter in letters]])
        valid = torch.tensor([[letter != "." for letter in letters]])
        assert prefix_lm_mask(types, valid, window)[0, 0].tolist() == picture


def test_the_drawn_cache():
    """`kv_cache.py` draws two rows that were prefilled in four columns and went on by two tokens and by one."""
    rows = re.findall(r"row \d +((?:[ips.] )+) +((?:[01] )+) +(\d)", kv_cache.__doc__)
    assert len(rows) == 2
    drawn = torch.tensor([[letter != "." for letter in letters.split()] for letters, _, _ in rows])
    cache = KVCache(tiny_config("gemma").text_config, batch=2, max_length=6)
    cache.extend(drawn[:, :4])
    cache.extend(drawn[:, 4:5])
    cache.extend(drawn[:, 5:6])
    assert cache.valid.int().tolist() == [[int(digit) for digit in digits.split()] for _, digits, _ in rows]
    assert cache.lengths.tolist() == [int(length) for _, _, length in rows]
    assert cache.positions[drawn].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------- the rules


@st.composite
def rows(draw):
    """One row: token types and valid flags of 1 to 12 positions, padding anywhere, prefix before suffix."""
    valid = draw(st.lists(st.booleans(), min_size=1, max_size=12).filter(any))
    prefix = draw(st.integers(0, len(valid)))
    types = [int(column >= prefix) for column in range(len(valid))]
    return torch.tensor([types]), torch.tensor([valid])


windows = st.none() | st.integers(1, 14)
# The same examples in every run; no time limit for one, since other tests may run beside it.
examples = settings(max_examples=150, derandomize=True, deadline=None, database=None)


def allowed(types, valid, q, k, window):
    """The rules in words of one syllable, for one query and one key of one row."""
    if not valid[q] or not valid[k]:
        return q == k and not valid[q]
    if types[q] == types[k] == 0:
        return True
    distance = sum(valid[k:q])  # real tokens from the key to the query, padding does not count
    return k <= q and (window is None or distance < window)


@examples
@given(rows(), windows)
def test_every_cell_follows_the_rules(row, window):
    types, valid = row
    mask = prefix_lm_mask(types, valid, window)[0, 0]
    t, v, S = types[0].tolist(), valid[0].tolist(), types.shape[1]
    assert mask.tolist() == [[allowed(t, v, q, k, window) for k in range(S)] for q in range(S)]


@examples
@given(rows(), windows)
def test_prefix_never_sees_suffix(row, window):
    types, valid = row
    mask = prefix_lm_mask(types, valid, window)[0, 0]
    prefix, suffix = ((types == kind) & valid for kind in (0, 1))
    assert not mask[prefix[0]][:, suffix[0]].any()
    assert mask[prefix[0]][:, prefix[0]].all()


@examples
@given(rows(), windows)
def test_padding_is_seen_by_nobody_but_itself_and_every_row_sees_something(row, window):
    types, valid = row
    mask = prefix_lm_mask(types, valid, window)[0, 0]
    pads = ~valid[0]
    assert torch.equal(mask[:, pads], torch.eye(len(pads), dtype=torch.bool)[:, pads])
    assert mask.any(-1).all()


@examples
@given(rows(), windows)
def test_padding_changes_nothing_wherever_it_stands(row, window):
    """Left, right or in the middle: with the padding taken out again the mask is that of the bare row."""
    types, valid = row
    real = valid[0]
    padded = prefix_lm_mask(types, valid, window)[0, 0][real][:, real]
    bare = prefix_lm_mask(types[:, real], valid[:, real], window)[0, 0]
    assert torch.equal(padded, bare)


@examples
@given(rows())
def test_a_window_as_long_as_the_row_is_no_window(row):
    types, valid = row
    assert torch.equal(prefix_lm_mask(types, valid, types.shape[1]), prefix_lm_mask(types, valid))


@examples
@given(rows(), windows, st.data())
def test_continuing_a_cache_gives_the_rows_of_the_whole_mask(row, window, data):
    """Prefill up to any place in the suffix, then the rest in pieces: the same mask, row by row."""
    types, valid = row
    S, prefix = types.shape[1], int((types == 0).sum())
    mask = prefix_lm_mask(types, valid, window)
    cache = KVCache(tiny_config("gemma").text_config, batch=1, max_length=S)
    done = data.draw(st.integers(prefix, S), label="prefilled")
    cache.extend(valid[:, :done])
    while done < S:
        piece = data.draw(st.integers(1, S - done), label="piece")
        place = cache.extend(valid[:, done : done + piece])
        stored = cache.positions[:, : cache.used], cache.valid[:, : cache.used]
        done += piece
        assert torch.equal(cached_mask(place, *stored, window), mask[:, :, done - piece : done, :done])


@examples
@given(rows())
def test_positions_count_real_tokens(row):
    _, valid = row
    assert positions(valid)[valid].tolist() == list(range(int(valid.sum())))


def test_rows_of_a_batch_do_not_touch():
    types = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
    valid = torch.tensor([[False, True, True, True], [True, True, True, False]])
    both = prefix_lm_mask(types, valid, window=2)
    alone = [prefix_lm_mask(types[b : b + 1], valid[b : b + 1], window=2) for b in range(2)]
    assert torch.equal(both, torch.cat(alone))


def test_the_suffix_starts_at_the_first_label():
    labels = torch.tensor([[-100, -100, 7, -100, 8, -100], [-100] * 6])
    assert token_types_from_labels(labels).tolist() == [[0, 0, 1, 1, 1, 1], [0] * 6]


# ---------------------------------------------------------------------------------------------- what it does to logits

# One row of three: padding, 4 image tokens, 5 words, 4 tokens of the answer; padded by 3 on one side.
PREFIX, SUFFIX, PADS = 4 + 5, 4, 3
MODELS = {
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),  # layer 0 slides over 4 tokens, layer 1 sees all
    "gemma2, fused": ("gemma2", {"attn_logit_softcapping": None}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    kind, overrides = MODELS[request.param]
    model = PaliGemmaForConditionalGeneration(tiny_config(kind, **overrides)).eval()
    randomize(model)
    return model


@pytest.fixture(params=["left", "right"])
def padded(request, model):
    """(inputs of a batch of two whose first row is padded, columns of its prefix, of its suffix, of its padding)."""
    inputs = make_inputs(model.config, prefix=[5, 5 + PADS], suffix=[SUFFIX, SUFFIX], side=request.param)
    columns = torch.arange(inputs["input_ids"].shape[1])
    first = PADS if request.param == "left" else 0
    prefix, suffix = columns[first : first + PREFIX], columns[first + PREFIX : first + PREFIX + SUFFIX]
    padding = columns[inputs["attention_mask"][0] == 0]
    assert len(padding) == PADS
    return inputs, prefix, suffix, padding


def changed(model, before, **after):
    """bool [S]: at which positions the first row's logits are other numbers, bit by bit, than before the change.

    The second row must not have moved at all.
    """
    with torch.no_grad():
        old, new = model(**before).logits, model(**{**before, **after}).logits
    assert torch.equal(old[1], new[1])
    moved = (old[0] - new[0]).abs().amax(-1)
    assert ((moved == 0) | (moved > 1e-4)).all(), "a difference is there, or it is not"
    return moved > 0


def another(ids, column):
    """The ids with another word in one column of the first row."""
    ids = ids.clone()
    ids[0, column] = 17 if ids[0, column] != 17 else 18
    return ids


def test_a_suffix_token_changes_nothing_before_it(model, padded):
    inputs, prefix, suffix, padding = padded
    for n, column in enumerate(suffix):
        moved = changed(model, inputs, input_ids=another(inputs["input_ids"], column))
        assert not moved[prefix].any()
        assert not moved[suffix[:n]].any()
        assert not moved[padding].any()
        assert moved[suffix[n:]].all()


def test_a_prefix_token_changes_every_position(model, padded):
    inputs, prefix, suffix, padding = padded
    for column in prefix[4:]:  # the words; the image comes next
        moved = changed(model, inputs, input_ids=another(inputs["input_ids"], column))
        assert moved[prefix].all()
        assert moved[suffix].all()
        assert not moved[padding].any()


def test_a_pixel_changes_every_position(model, padded):
    inputs, prefix, suffix, padding = padded
    pixels = inputs["pixel_values"].clone()
    pixels[0, 0, 27, 27] = -pixels[0, 0, 27, 27]  # in the last patch
    moved = changed(model, inputs, pixel_values=pixels)
    assert moved[prefix].all()
    assert moved[suffix].all()
    assert not moved[padding].any()


def test_a_padded_position_changes_nothing(model, padded):
    inputs, _, _, padding = padded
    for column in padding:
        moved = changed(model, inputs, input_ids=another(inputs["input_ids"], column))
        assert moved.nonzero().flatten().tolist() == [column]  # itself, which nobody reads
        types = inputs["token_type_ids"].clone()
        types[0, column] = 1
        assert not changed(model, inputs, token_type_ids=types).any()


def test_two_images_see_each_other(model):
    inputs = make_inputs(model.config, prefix=[3, 3], suffix=[2, 2], images=2)
    for image in (0, 1):
        pixels = inputs["pixel_values"].clone()
        pixels[image] = pixels[image].flip(-1)
        assert changed(model, inputs, pixel_values=pixels).all()


def test_the_suffix_forgets_what_left_its_window():
    """One layer that slides over 4 tokens: an answer token still sees the word 3 before it, no longer the one 4 before.

    (With two layers it would hear of it from others.) Inside the prefix everybody sees everybody all the same.
    """
    model = PaliGemmaForConditionalGeneration(tiny_config("gemma2", num_hidden_layers=1)).eval()
    randomize(model)
    inputs = make_inputs(model.config, prefix=[5, 5], suffix=[4, 4])
    moved = changed(model, inputs, input_ids=another(inputs["input_ids"], PREFIX - 1))
    assert moved[:PREFIX].all()
    assert moved[PREFIX:].tolist() == [True, True, True, False]


# ---------------------------------------------------------------------------------------------- fields left out


@torch.no_grad()
def test_types_left_out_with_labels_do_not_leak_the_answer(model, padded):
    """The suffix is found by its labels; loss and logits are those of the full set of fields."""
    inputs, prefix, suffix, _ = padded
    labels = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, -100)
    complete = model(**inputs, labels=labels)
    bare = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
    out = model(**bare, labels=labels)
    valid = inputs["attention_mask"].bool()
    assert torch.equal(out.logits[valid], complete.logits[valid])
    assert torch.equal(out.loss, complete.loss)

    moved = changed(model, {**bare, "labels": labels}, input_ids=another(inputs["input_ids"], suffix[2]))
    assert not moved[prefix].any()
    assert moved[suffix].tolist() == [False, False, True, True]


@torch.no_grad()
def test_types_left_out_without_labels_make_everything_prefix(model, padded):
    """A prompt is never silently causal: its first token sees its last."""
    inputs, prefix, suffix, _ = padded
    bare = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
    moved = changed(model, bare, input_ids=another(inputs["input_ids"], suffix[-1]))
    assert moved[prefix].all()
    assert moved[suffix].all()


@torch.no_grad()
def test_an_attention_mask_left_out_means_no_padding(model):
    inputs = make_inputs(model.config, prefix=[5, 5], suffix=[2, 2])
    bare = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
    assert torch.equal(model(**bare).logits, model(**inputs).logits)


@torch.no_grad()
def test_what_continues_a_cache_is_causal(model):
    """No types given: of two tokens passed at once the second does not reach the first, nor does it reach the cache."""
    inputs = make_inputs(model.config, prefix=[5, 3])
    S, answer = inputs["input_ids"].shape[1], torch.tensor([[7, 8], [9, 10]])

    def continued(tokens):
        cache = KVCache(model.config.text_config, 2, S + 2)
        model(**inputs, cache=cache)
        return model(tokens, cache=cache).logits

    logits, other = continued(answer), continued(torch.tensor([[7, 88], [9, 90]]))
    assert torch.equal(logits[:, 0], other[:, 0])
    assert not torch.equal(logits[:, 1], other[:, 1])
