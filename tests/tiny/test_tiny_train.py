"""The parts of the recipe: scenes in files, packed rows, the initial decoder, the tokenizer, the codec."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import paligemma
from paligemma.answers.mask_codec import MaskCodec
from paligemma.attention_mask import prefix_lm_mask
from paligemma.modeling_gemma import GemmaConfig, PaliGemmaConfig
from paligemma.modeling_siglip import SiglipVisionConfig
from paligemma.tiny import rows, world
from paligemma.tiny.recipe.batches import PromptBatches, joint_loss, packed_mask, soft_cross_entropy
from paligemma.tiny.recipe.codec import WIDTHS, code_similarity
from paligemma.tiny.recipe.joint_training import JointModel, initialize_decoder, location_embeddings
from paligemma.tiny.recipe.settings import FIRST, Recipe
from paligemma.tiny.recipe.shards import Shard, pack, picture, shard_path, training_scene, write_shard
from paligemma.tiny.recipe.tokenizer import build_tokenizer, world_words
from paligemma.tiny.recipe.train import train
from paligemma.tiny.recipe.vision_pretraining import (
    NONE,
    PatchHeads,
    SceneBatches,
    Vision,
    load_weights,
    stored_targets,
    vision_part,
)
from paligemma.tiny.renderer import render

torch.set_num_threads(1)
SIDE, BIN_STEP = FIRST.image_size, FIRST.bin_step


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def scenes_folder(small_shards, tmp_path_factory):
    """Four shards of 16 scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(4):
        write_shard(folder, number)
    return folder


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return MaskCodec(**WIDTHS).eval()


@pytest.fixture(scope="module")
def joint(tokenizer, scenes_folder):
    torch.manual_seed(0)
    vision = SiglipVisionConfig(32, 64, 1, 2, image_size=128, patch_size=16)
    text = GemmaConfig("gemma", 64 * -(-len(tokenizer) // 64), 32, 64, 2, 2, 2, 16)
    config = PaliGemmaConfig(text, vision, image_token_index=tokenizer.image_token_id)
    return initialize_decoder(Vision(vision), tokenizer, config, SceneBatches(scenes_folder, 16)(0, 0, 1))


# ---------------------------------------------------------------------------------------------------------- scenes


def test_a_shard_gives_back_its_scenes(scenes_folder):
    shard = Shard.load(shard_path(scenes_folder, 1))
    for i in range(len(shard)):
        drawn, kept = training_scene(16 + i), shard.scene(i)
        assert np.array_equal(shard.arrays["image"][i], picture(drawn))
        assert kept.size == drawn.size and kept.background == drawn.background
        for a, b in zip(drawn.objects, kept.objects, strict=True):
            assert np.array_equal(a.mask, b.mask)
            assert (a.label, a.tint, a.box, a.text) == (b.label, b.tint, b.box, b.text)


def test_mirrored_targets_are_those_of_the_mirrored_scene():
    scene = next(s for s in map(render, range(100)) if len(s.objects) > 2 and s.sign is None)
    mirrored_objects = []
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        box = (scene.size - x1, y0, scene.size - x0, y1)
        mirrored_objects.append(world.SceneObject(thing.label, thing.tint, box, thing.mask[:, ::-1], thing.visible))
    mirrored_objects.sort(key=lambda thing: thing.box[0])
    facts = (scene.background, scene.pattern, scene.style, scene.seed, scene.split)
    mirror = world.Scene(scene.image[:, ::-1], tuple(mirrored_objects), *facts)

    def targets(scene, flip):
        arrays = pack([scene])
        shard = Shard(arrays, json.loads(arrays.pop("facts").tobytes()))
        return stored_targets(shard, np.array([0]), np.array([flip]))

    image, flipped = targets(scene, True)
    _, expected = targets(mirror, False)
    assert np.array_equal(image[0], picture(scene)[:, ::-1])
    for name in expected:
        np.testing.assert_allclose(flipped[name], expected[name], atol=1e-6, err_msg=name)


def test_a_vision_batch_has_what_the_heads_learn(scenes_folder):
    batches = SceneBatches(scenes_folder, size=8)
    batch = batches(0, 0, 1)
    again = SceneBatches(scenes_folder, size=8)(0, 0, 1)
    assert all(torch.equal(batch[name], again[name]) for name in batch), "a function of the step"
    assert batch["pixel_values"].shape == (8, 3, SIDE, SIDE)
    assert batch["pixel_values"].min() >= -1 and batch["pixel_values"].max() <= 1
    heads = PatchHeads(16)
    loss, figures = heads.loss(torch.randn(8, 64, 16), batch)
    assert torch.isfinite(loss) and 0 <= figures["class"] <= 1
    assert (batch["order"] <= batch["total"]).all() and (batch["same"] <= batch["total"]).all()


def test_a_small_batch_may_have_nothing_for_some_heads(scenes_folder):
    """No background that has a name, and no thing at all: the mean of nothing is no number."""
    batch = SceneBatches(scenes_folder, size=8)(0, 0, 1)
    heads = PatchHeads(16)
    for changed in ({"background": NONE, "total": NONE}, {"class": 0, "same": NONE, "order": NONE, "codes": NONE}):
        batch |= {name: torch.full_like(batch[name], value) for name, value in changed.items()}
        loss, figures = heads.loss(torch.randn(8, 64, 16, requires_grad=True), batch)
        assert torch.isfinite(loss) and figures["loss/background"] == 0
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in heads.parameters())


def test_a_patch_learns_the_mask_codes_of_what_it_covers():
    """Codes that count the cells of the box: then the code at a point says where in the box the point lies."""
    scene = next(s for s in map(render, range(100)) if len(s.objects) > 2)
    arrays = pack([scene])
    shard = Shard(arrays, json.loads(arrays.pop("facts").tobytes()))
    codes = np.stack([np.arange(16) + 16 * k for k in range(len(scene.objects))]).astype(np.uint8)
    _, targets = stored_targets(shard, np.array([0]), np.array([False]), codes)
    index, predicted = arrays["index"][0], targets["codes"][0].reshape(8, 8, 2, 2)
    known = 0
    for i, j, down, right in np.ndindex(8, 8, 2, 2):
        x, y = (j + (0.25, 0.75)[right]) / 8, (i + (0.25, 0.75)[down]) / 8
        if index[i, j] < 0:
            assert predicted[i, j, down, right] == NONE
            continue
        x0, y0, x1, y1 = np.array(scene.objects[index[i, j]].box) / scene.size
        if x0 < x < x1 and y0 < y < y1:
            column, row = int((x - x0) / (x1 - x0) * 4), int((y - y0) / (y1 - y0) * 4)
            assert predicted[i, j, down, right] == 16 * index[i, j] + 4 * row + column
            known += 1
        else:
            assert predicted[i, j, down, right] == NONE
    assert known > 20
    _, mirrored = stored_targets(shard, np.array([0]), np.array([True]), codes)
    assert (mirrored["codes"] == NONE).all()


def test_stage_1_can_start_from_the_vision_tower_of_stage_2(joint):
    vision = Vision(joint.model.config.vision_config)
    load_weights(vision, vision_part(joint.state_dict()))
    again = Vision(joint.model.config.vision_config)
    load_weights(again, vision_part(vision.state_dict()))
    x = torch.rand(1, 3, SIDE, SIDE)
    expected = joint.heads.linear(joint.model.vision_tower(x))
    for model in (vision, again):
        assert torch.equal(model.heads.linear(model.model(x)), expected)


# ------------------------------------------------------------------------------------------------------ packed rows


def test_the_mask_of_packed_rows_is_the_one_drawn():
    drawn = """
        1 1 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        1 1 0 0 1 0
        1 1 0 0 1 1
    """
    expected = torch.tensor([[int(x) for x in line.split()] for line in drawn.split("\n") if line.strip()]).bool()
    row, place = torch.tensor([[0, 0, 1, 1, 2, 2]]), torch.tensor([[0, 1, 2, 3, 2, 3]])
    written = torch.tensor([[0, 0, 0, 1, 0, 1]]).bool()
    assert torch.equal(packed_mask(row, place, written, images_read=False)[0, 0], expected)


def test_an_unpacked_row_has_the_model_s_own_mask(scenes_folder, tokenizer, codec):
    batch = PromptBatches(scenes_folder, tokenizer, codec, size=4, unpacked_every=1)(0, 0, 1)
    valid, types = batch["row"] >= 0, batch["is_answer"].long()
    ours, true = batch["attention"], prefix_lm_mask(types, valid)
    for b in range(len(ours)):
        n = int(valid[b].sum())
        assert torch.equal(ours[b, 0, :n, :n], true[b, 0, :n, :n])


def test_the_loss_of_unpacked_rows_is_the_model_s_own_but_for_weights_and_soft_targets(
    scenes_folder, tokenizer, codec, joint, monkeypatch
):
    """With targets in one bin and equal weights: `forward(labels=...)` on the same rows."""
    batch = PromptBatches(scenes_folder, tokenizer, codec, size=4, unpacked_every=1)(0, 0, 1)
    batch["weights"] = (batch["labels"] != -100).float()
    total, weight, _ = joint_loss(tokenizer.first_loc_id, auxiliary=0.0, sigma=1e-3)(joint, batch)
    with_prompts, repeat = batch["counts"].tolist()
    with torch.autocast("cpu", enabled=False):
        out = joint.model(
            batch["input_ids"],
            batch["pixel_values"][:with_prompts].repeat_interleave(repeat, 0),
            attention_mask=(batch["row"] >= 0).long(),
            labels=batch["labels"],
        )
    assert float(total.detach()) / weight == pytest.approx(float(out.loss.detach()), rel=1e-5)


def test_packing_changes_nothing_for_a_row(scenes_folder, tokenizer, codec, joint):
    """The same hidden states whether rows are packed or not, when image tokens never attend to prompts."""
    packed = PromptBatches(scenes_folder, tokenizer, codec, size=4, unpacked_every=10**9)(0, 0, 1)
    model = joint.model
    features = model.encode_image(packed["pixel_values"][:1])
    hidden = hidden_states(model, packed, features, 0)
    count = int(packed["row"][0].max())
    assert count >= 3
    for number in (1, count):
        keep = (packed["row"][0] == 0) | (packed["row"][0] == number)
        own = {name: packed[name][:1, keep] for name in ("input_ids", "row", "position", "is_answer")}
        own["attention"] = packed_mask(own["row"], own["position"], own["is_answer"], images_read=False)
        torch.testing.assert_close(hidden_states(model, own, features, 0), hidden[keep], rtol=1e-4, atol=1e-4)


def hidden_states(model, batch, features, b):
    x = model.embed(batch["input_ids"][b : b + 1], features)
    return model.language_model.model(x, batch["position"][b : b + 1] + 1, {None: batch["attention"][b : b + 1]})[
        0
    ].detach()


def test_answers_are_right_and_end(scenes_folder, tokenizer, codec):
    batch = PromptBatches(scenes_folder, tokenizer, codec, size=4, unpacked_every=10**9)(0, 0, 1)
    tasks = set()
    for ids, row, labels, weights in zip(batch["input_ids"], batch["row"], batch["labels"], batch["weights"]):
        for number in range(1, int(row.max()) + 1):
            text, label = ids[row == number], labels[row == number]
            answer = label[label != -100]
            assert text[0] == tokenizer.bos_token_id and answer[-1] == tokenizer.eos_token_id
            prompt = tokenizer.decode(text[label == -100].tolist())
            assert prompt.endswith("\n")
            tasks.add(prompt.split()[0])
            assert float(weights[row == number].sum()) == pytest.approx(len(answer) ** 0.5, rel=1e-5)
    assert {"caption", "answer", "detect", "segment"} <= tasks


def test_inputs_have_some_wrong_codes_and_letters_while_targets_stay_right(scenes_folder, tokenizer, codec):
    batches = PromptBatches(scenes_folder, tokenizer, codec, size=4)
    rng = np.random.default_rng(0)
    seg = list(range(tokenizer.first_seg_id, tokenizer.first_seg_id + codec.num_codes))
    mask = [*tokenizer.encode("<loc0008><loc0016><loc0800><loc0400>"), *seg[:16], *tokenizer.encode(" dog"), 1]
    word, found = [*tokenizer.encode("KING42"), 1], [*tokenizer.encode("a red car and a dog"), 1]
    replaced = {"mask": [], "word": []}
    for _ in range(300):
        assert batches.corrupt(found, rng) == found
        for name, answer in (("mask", mask), ("word", word)):
            read = batches.corrupt(answer, rng)
            wrong = [i for i, (a, b) in enumerate(zip(answer, read, strict=True)) if a != b]
            allowed = seg if name == "mask" else batches.letters
            assert all(answer[i] in allowed and read[i] in allowed for i in wrong)
            replaced[name].append(len(wrong))
    assert 0.1 < np.mean(replaced["word"]) / 6 < 0.3
    assert 0.2 < np.mean(replaced["mask"]) / 16 < 0.45 and 0.3 < np.mean(np.array(replaced["mask"]) == 0) < 0.5
    batch = batches(0, 0, 1)  # the targets are right: only the inputs differ
    given = batch["labels"] != -100
    differ = batch["input_ids"][given] != batch["labels"][given]
    assert differ.any() and differ.float().mean() < 0.4


def test_a_location_off_by_one_costs_less_than_one_far_off(tokenizer):
    """Cross-entropy alone would punish both equally."""
    first = tokenizer.first_loc_id

    def cost(predicted: int, true: int) -> float:
        logits = torch.zeros(1, first + 1024)
        logits[0, first + BIN_STEP * predicted] = 5.0
        return float(soft_cross_entropy(logits, torch.tensor([first + BIN_STEP * true]), first))

    assert cost(50, 50) < cost(51, 50) < cost(52, 50) < cost(60, 50)
    assert cost(60, 50) == pytest.approx(cost(90, 50))
    assert cost(0, 0) < cost(1, 0) < cost(9, 0) and cost(127, 127) < cost(126, 127)  # at the ends of the axis too


def test_words_cost_what_cross_entropy_says(tokenizer):
    logits, targets = (
        torch.randn(5, tokenizer.first_loc_id + 1152),
        torch.tensor([1, 7, 300, 400, tokenizer.first_seg_id]),
    )
    ours = soft_cross_entropy(logits, targets, tokenizer.first_loc_id)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


def test_a_code_that_is_nearly_the_right_one_costs_less(tokenizer, codec):
    first = tokenizer.first_seg_id
    similarity = code_similarity(codec)
    torch.testing.assert_close(similarity.sum(1), torch.ones(codec.num_codes))
    assert (similarity.argmax(1) == torch.arange(codec.num_codes)).all()
    near, far = similarity[5].argsort(descending=True)[[1, -1]]

    def cost(predicted: int, similarity: torch.Tensor | None) -> float:
        logits = torch.zeros(1, first + codec.num_codes)
        logits[0, first + predicted] = 5.0
        target = torch.tensor([first + 5])
        return float(soft_cross_entropy(logits, target, tokenizer.first_loc_id, similarity=similarity))

    assert cost(5, similarity) < cost(int(near), similarity) < cost(int(far), similarity)
    assert cost(int(near), None) == pytest.approx(cost(int(far), None))


# ---------------------------------------------------------------------------------------- words and initial weights


def test_every_word_of_the_world_is_one_token(tokenizer):
    begin, inside = world_words()
    assert all(len(tokenizer.encode(word)) == 1 for word in begin)
    assert all(len(tokenizer.encode(" " + word)) == 1 for word in inside)
    for seed in range(20):
        scene = render(seed)
        for row in rows.rows(scene, np.random.default_rng(seed)):
            for text in (row.prefix, row.suffix):
                ids = tokenizer.encode(text)
                assert tokenizer.decode(ids) == text
                if row.task != "ocr":  # a sign's text is spelt; in the rest only ";" and the space before <loc> are
                    assert len(ids) <= 2 * len(text.replace("<", " <").replace(",", " ,").replace("?", " ?").split())


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("Grüße, 世界!", "KING 42", "a\tb", "<loc0007> dog", "x  y"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_embeddings_of_neighbouring_locations_start_similar():
    code = location_embeddings(64)
    likeness = code @ code.T
    assert torch.allclose(likeness.diagonal(), torch.ones(1024), atol=1e-5)
    assert likeness[512, 520] > 0.8
    assert likeness[512, 520] > likeness[512, 544] > likeness[512, 800]


def test_word_embeddings_start_aligned_with_the_patch_heads(tokenizer, scenes_folder):
    """Before any step of stage 2: the output layer predicts what a patch's class head predicts."""
    torch.manual_seed(0)
    vision_config = SiglipVisionConfig(128, 64, 1, 2, image_size=128, patch_size=16)
    text = GemmaConfig("gemma", 64 * -(-len(tokenizer) // 64), 128, 64, 1, 2, 2, 64)
    vision = Vision(vision_config)
    config = PaliGemmaConfig(text, vision_config, image_token_index=tokenizer.image_token_id)
    joint: JointModel = initialize_decoder(vision, tokenizer, config, SceneBatches(scenes_folder, 16)(0, 0, 1))
    classes = [tokenizer.encode(label)[0] for label in world.LABELS]
    assert all(len(tokenizer.encode(label)) == 1 for label in world.LABELS)
    patches = vision.heads.linear.weight.detach()[1 : 1 + len(world.LABELS)]  # each the ideal patch of its class
    words = joint.model.language_model.model.embed_tokens.weight.detach()[classes]
    named = (joint.model.multi_modal_projector(patches) @ words.T).argmax(-1)
    assert (named == torch.arange(len(world.LABELS))).float().mean() > 0.9


def test_repeated_key_value_heads_compute_the_same(tokenizer, joint):
    config = joint.model.config
    narrow = JointModel(replace(config, text_config=replace(config.text_config, num_key_value_heads=1)))
    grown = JointModel(config)
    load_weights(grown, narrow.state_dict())
    inputs = {"input_ids": torch.tensor([[*[tokenizer.image_token_id] * 64, 2, *tokenizer.encode("caption en"), 4]])}
    inputs["pixel_values"] = torch.rand(1, 3, 128, 128)
    torch.testing.assert_close(grown.model(**inputs).logits, narrow.model(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_whole_recipe_in_a_few_seconds(tmp_path, monkeypatch):
    """Every stage for a step or two, then a second run that resumes, then a checkpoint that opens."""
    for module in ("shards", "batches", "vision_pretraining"):
        monkeypatch.setattr(f"paligemma.tiny.recipe.{module}.SHARD", 64)
    recipe = Recipe(codec_steps=2)
    train(0.001, tmp_path, recipe=recipe)  # rendering alone takes longer
    package = train(0.1, tmp_path, recipe=recipe)
    assert sorted(path.name for path in tmp_path.glob("joint-*")) == ["joint-01", "joint-02"]
    pg = paligemma.load(str(package), device="cpu")
    assert isinstance(pg.caption(render(0).image).text, str)
    assert pg.codec.num_codes == 128
