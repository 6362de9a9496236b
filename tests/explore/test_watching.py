"""One teacher-forced pass: equal to prefill and cached steps, and it leaves the model as it was."""

import pytest
import torch
from torch.testing import assert_close

from paligemma import explore
from paligemma.generation import decode_one_token, prefill
from paligemma.images import preprocess

ANSWER = "a dog <loc0017><loc0500>"


def hooks_of(model):
    return [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]


def test_what_a_look_holds(random_pg, picture):
    look = explore.look(random_pg, picture, "caption en", ANSWER)
    S, A, L = len(look.input_ids), len(look.answer_ids), random_pg.model.config.text_config.num_hidden_layers
    assert look.tokens[:5] == ["<image>"] * 4 + ["<bos>"] and look.tokens[look.first_answer - 1] == "\n"
    assert "".join(look.tokens[look.first_answer :]) == look.answer == ANSWER
    assert (look.images, look.grid, look.first_text) == (1, 2, 4)
    assert look.first_answer + A == S and look.token_type_ids.tolist() == [0] * look.first_answer + [1] * A
    assert look.features.shape == (1, 4, 32) and len(look.hidden_states) == L + 1
    assert all(state.shape == (S, 32) and state.dtype == torch.float32 for state in look.hidden_states)
    assert look.logprobs.shape == (A,) and not look.logprobs.requires_grad


def test_one_pass_equals_prefill_and_cached_steps(random_pg, picture):
    look = explore.look(random_pg, picture, "caption en", ANSWER)
    model, prefix = random_pg.model, look.input_ids[None, : look.first_answer]
    pixels = preprocess(look.picture, 28)[None]
    with torch.inference_mode():
        logits, cache = prefill(model, {"input_ids": prefix, "pixel_values": pixels}, len(look.answer_ids))
        for token, logprob in zip(look.answer_ids, look.logprobs):
            assert_close(logits.log_softmax(-1)[0, token], logprob, atol=1e-5, rtol=0)
            logits = decode_one_token(model, token[None], cache)


def test_without_an_answer_it_is_what_the_model_writes(tiny):
    """For detect under its grammar, as `paligemma run` does."""
    scene = "examples/scene.png"
    look = explore.look(tiny, scene, "detect book ; house")
    assert look.answer == tiny.generate(scene, "detect book ; house", 512, constrained=True).text
    assert look.logprobs.min() > -2  # every token of its own answer is likely


def test_two_pictures(random_pg, picture):
    look = explore.look(random_pg, (picture, picture[::-1].copy()), "caption en", ANSWER)
    assert (look.images, look.first_text, look.features.shape) == (2, 8, (2, 4, 32))
    assert isinstance(look.picture, tuple) and look.image_columns.tolist() == list(range(8))
    assert explore.attention(look).on_image().shape[-3:] == (2, 2, 2)
    single = explore.look(random_pg, picture, "caption en", ANSWER)
    assert_close(look.features[0], single.features[0])


def test_the_model_is_left_as_it_was(random_pg, picture):
    """No hook stays, after success, an exception inside a hook or Ctrl-C; and the logits are the same bits."""
    look = explore.look(random_pg, picture, "caption en", ANSWER)
    model = random_pg.model
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    def logits():
        with torch.no_grad():
            return model(look.input_ids[None], image_features=look.features, token_type_ids=look.token_type_ids[None])

    before = logits().logits
    explore.routes(look, 0)
    explore.without(look, [0])
    assert hooks_of(model) == [] and torch.equal(logits().logits, before)

    for error in (RuntimeError, KeyboardInterrupt):

        def fail(x, mask, error=error):
            raise error

        with pytest.raises(error):
            explore.watching.run(look, layers={1: fail})
        assert hooks_of(model) == []

    assert torch.equal(logits().logits, before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_a_look_changes_no_bit_of_the_logits(random_pg, picture):
    look = explore.look(random_pg, picture, "caption en", ANSWER)
    with torch.no_grad():
        out = random_pg.model(
            look.input_ids[None], image_features=look.features, token_type_ids=look.token_type_ids[None],
            output_hidden_states=True,
        )  # fmt: skip
    assert torch.equal(explore.watching.logprobs_of_answer(look, out.hidden_states[-1])[0], look.logprobs)
    assert all(map(torch.equal, look.hidden_states[:-1], (state[0] for state in out.hidden_states[:-1])))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_every_layer_of_a_quantised_model_is_seen(quantize):
    import paligemma

    pg = paligemma.load("tiny", device="cpu", quantize=quantize)
    look = explore.look(pg, "examples/scene.png", "caption en")
    attention = explore.attention(look)
    assert len(look.hidden_states) == 7 and attention.weights.shape[0] == 6
    assert_close(attention.weights.sum(-1), torch.ones(attention.weights.shape[:3]), atol=1e-5, rtol=0)
    assert explore.cut(look, [], [], range(6)).drop.abs().max() == 0


def test_the_query_of_a_token_stands_one_column_to_its_left(random_pg, picture):
    look = explore.look(random_pg, picture, "caption en", ANSWER)
    assert look.query_of(0) == look.first_answer - 1
    with pytest.raises(ValueError, match="there is no token 99"):
        look.query_of(99)
    with pytest.raises(ValueError, match="there is no token -1"):
        look.query_of(-1)
