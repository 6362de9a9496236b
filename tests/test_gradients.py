"""What a step of training does to the weights, beside transformers doing the same: loss, gradients, one step.

`test_parity.py` compares the gradients of the model's own loss for many shapes; here it is the loss that is trained
with (`suffix_loss`), padding on both sides, bfloat16, and the whole step of `train`.
"""

import copy

import pytest
import torch
from reference import make_inputs, make_pair, make_theirs, their_name

from paligemma.train.loop import TrainConfig, train
from paligemma.train.loss import suffix_loss

KINDS = ("gemma", "gemma2")


def make_batch(config, side, seed=0):
    return make_inputs(config, prefix=[5, 3, 7], suffix=[2, 4, 1], side=side, labels=True, seed=seed)


def our_gradients(model, batch):
    """By their names, as those of transformers come."""
    model.zero_grad(set_to_none=True)
    total, tokens, _ = suffix_loss()(model, batch)
    (total / tokens).backward()
    return {their_name(name): parameter.grad.float() for name, parameter in model.named_parameters()}


def their_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def norm_of_all(gradients):
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm()


def has_no_gradient(name):
    """A bias of all keys shifts every score of a query alike, and softmax does not see it: what is there is noise."""
    return name.endswith("k_proj.bias")


@pytest.mark.parametrize("explicit", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_with_padding_on_either_side(kind, side, explicit):
    ours, theirs = make_pair(kind)
    ours.set_explicit_attention(explicit)
    batch = make_batch(ours.config, side)
    total, tokens, _ = suffix_loss()(ours, batch)
    torch.testing.assert_close(total / tokens, theirs(**batch).loss, atol=1e-5, rtol=0)

    here, there = our_gradients(ours, batch), their_gradients(theirs, batch)
    assert here.keys() == there.keys()
    whole = norm_of_all(there)
    for name, gradient in there.items():
        assert (here[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7 * whole, name


@pytest.mark.parametrize("way", ["weights in bfloat16", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_bfloat16_are_no_further_from_float32_than_theirs(kind, way):
    """The distance to the gradient of the same weights in float32, over four models and batches: ours beside theirs.

    Of one gradient it is a throw of the dice, hence the sum of squares over four.
    """
    ours_off: dict[str, float] = {}
    theirs_off: dict[str, float] = {}
    for seed in range(4):
        ours, _ = make_pair(kind, seed=seed, num_hidden_layers=4)
        batch = rounded = make_batch(ours.config, ("left", "right")[seed % 2], seed)
        if way != "autocast":
            ours.bfloat16()
            rounded = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
        theirs, exact = make_theirs(ours), make_theirs(copy.deepcopy(ours).float())
        reference = their_gradients(exact, batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            here, there = our_gradients(ours, rounded), their_gradients(theirs, rounded)
        whole = norm_of_all(reference)
        for name, gradient in reference.items():
            for off, other in ((ours_off, here), (theirs_off, there)):
                off[name] = off.get(name, 0.0) + float(((other[name] - gradient).norm() / whole) ** 2)

    assert sum(theirs_off.values()) > 1e-4  # it is bfloat16 that is measured
    assert sum(ours_off.values()) <= 1.5**2 * sum(theirs_off.values())
    for name in ours_off:
        if not has_no_gradient(name):
            assert ours_off[name] <= 2.5**2 * theirs_off[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_training(kind, tmp_path):
    """Clipping, Adam, and weight decay on the matrices of vision tower and projector, as a user of transformers would
    write it.

    Adam's first step moves a number by lr * g / |g|, g its gradient: an error of 1e-5 of the whole gradient of a
    parameter moves it by up to lr * 1e-5 * |gradient| / |g| to the side, and where g is as good as zero, up to 2 lr.
    """
    ours, theirs = make_pair(kind)
    batch = make_batch(ours.config, "right")
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}

    config = TrainConfig(steps=1, lr=1e-3, warmup=0.0, weight_decay=0.1, autocast=None)
    train(ours, lambda step, part, parts: batch, config, tmp_path)

    def decays(name, parameter):
        return not name.startswith("model.language_model") and parameter.ndim > 1 and "position_embedding" not in name

    theirs.train()(**batch).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    assert norm > 1, "clipping is to be seen"
    matrices = [p for name, p in theirs.named_parameters() if decays(name, p)]
    others = [p for name, p in theirs.named_parameters() if not decays(name, p)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-3).step()

    there = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        after = there[their_name(name)]
        assert not torch.equal(after, before[name]), name
        if not has_no_gradient(name):
            gradient = after.grad  # clipped, of which Adam's first step shows nothing
            assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
            allowed = 1e-3 * (1e-5 * gradient.norm() / (gradient.abs() + 1e-8)).clamp(max=2) + 1e-6 * after.abs()
            assert ((parameter - after).abs() <= allowed).all(), name
