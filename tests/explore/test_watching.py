"""One teacher-forced pass: equal to prefill and cached steps, and it leaves the model as it was."""

import threading
from itertools import chain

import pytest
import torch
from torch.testing import assert_close

from paligemma import explore
from paligemma.generation import decode_one_token, prefill
from paligemma.images import preprocess
from paligemma.train.parts import add_lora, set_dropout

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
    shorter = explore.look(tiny, scene, "caption en", max_new_tokens=3)
    assert len(shorter.answer_ids) == 3 and shorter.answer == tiny.generate(scene, "caption en", 3).text


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


@pytest.mark.parametrize("quantize", ["int8", "int4", "bf16"])
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


def test_a_prompt_may_place_its_picture_itself(random_pg, picture):
    """Then some of it stands before the picture, and that is prompt as well."""
    look = explore.look(random_pg, picture, "caption <image> en", ANSWER)
    before = look.tokens.index("<image>")
    groups = look.groups(2)
    assert before > 0 and look.tokens[look.first_text] == "<bos>"
    assert "".join(look.tokens[column] for column in groups["prompt"]) == "caption  en"
    assert sorted(chain(*list(groups.values())[:5])) == list(range(look.query_of(2) + 1))  # each column in one group
    share = explore.attention(look, "all").share()
    assert_close(share.sum(-1), torch.ones(share.shape[:-1]), atol=1e-5, rtol=0)
    assert "prompt->image" in explore.routes(look, 0).names


def test_threads_that_use_one_model_do_not_see_the_changes_of_each_other(random_pg, picture):
    """What is cut in one thread is not cut in another, which runs the model at the same time."""
    look = explore.look(random_pg, picture, "caption en", ANSWER)
    written = random_pg.generate(picture, "caption en", 5).token_ids
    found, started = [], []

    def beside():
        again = explore.look(random_pg, picture, "caption en", ANSWER)
        found.append((again, random_pg.generate(picture, "caption en", 5).token_ids, explore.cut(look, [], [], [])))

    def change(x, mask):
        if not started:
            started.append(threading.Thread(target=beside))
            started[0].start()
            started[0].join()
        return torch.zeros_like(x), mask

    outside = explore.watching.run(look)
    changed = explore.watching.run(look, layers={1: change})
    assert not torch.equal(changed, outside)
    ((again, ids, cut),) = found
    assert again.num_layers == look.num_layers and torch.equal(again.logprobs, look.logprobs)
    assert ids == written and cut.drop.abs().max() == 0


def test_a_model_that_trains_is_looked_at_without_dropout(make_pg, picture):
    pg = make_pg("gemma")
    set_dropout(pg.model, 0.5)
    add_lora(pg.model, "decoder", rank=4, dropout=0.5)
    for name, parameter in pg.model.named_parameters():
        if "lora_B" in name:  # zero at first: then what A reads would not matter
            torch.nn.init.normal_(parameter)
    expected = explore.look(pg, picture, "caption en")
    weights = explore.attention(expected).weights
    pg.model.train()
    pg.model.vision_tower.eval()  # as if it did not learn
    modes = [module.training for module in pg.model.modules()]
    look = explore.look(pg, picture, "caption en")
    assert look.answer == expected.answer and torch.equal(look.logprobs, expected.logprobs)
    assert torch.equal(explore.attention(look).weights, weights)
    assert explore.cut(look, [], [], range(2)).drop.abs().max() == 0
    assert explore.without(look, []).text == look.answer
    with pytest.raises(ValueError, match="left without any key"):
        explore.cut(look, [3], range(len(look.input_ids)), [0])
    assert [module.training for module in pg.model.modules()] == modes


def test_no_picture_is_an_error_that_says_so(random_pg):
    with pytest.raises(ValueError, match="image is an empty tuple: give one picture or more"):
        explore.look(random_pg, (), "caption en", ANSWER)
