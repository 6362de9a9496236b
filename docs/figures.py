"""Draws the figures of the course from the embedded model, and renews the numbers that its chapters quote.

    python docs/figures.py            all of them
    python docs/figures.py 3 11       those of some chapters

Each function below draws the figure of one chapter and returns it with the numbers of its text. They are kept in
`course/figures/numbers.json`, and in the chapters each number stands in front of its name: `144<!--patches-->`. When
another model is packaged, run this, then read the chapters again: numbers are renewed here, sentences are not.
"""

import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from figure_style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    OPPOSED,
    ORANGE,
    PALE,
    SCALE,
    STYLE,
    bare,
    framed,
    heat,
    lines,
    percent,
    show_picture,
)
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import paligemma
from paligemma import explore
from paligemma.attention_mask import prefix_lm_mask
from paligemma.images import preprocess
from paligemma.tiny import course
from paligemma.tiny.renderer import render
from paligemma.weights.published import published_config

CHAPTERS = Path(__file__).parent / "course"
FIGURES = CHAPTERS / "figures"
# A number, a shape in brackets or a token in backticks, and its name.
NUMBER = re.compile(r"(\[[^\[\]\n]*\]|`[^`\n]*`|[^\s<>`]+)<!--([\w.-]+)-->")


@dataclass
class Seen:
    """What most figures start from: the model, the scene, and one look at it."""

    pg: paligemma.PaliGemma
    scene: course.Scene
    look: explore.Look

    @property
    def grid(self) -> int:
        return self.look.grid

    def token(self, word: str) -> int:
        return [token.strip() for token in self.look.tokens[self.look.first_answer :]].index(word)

    def patches(self, label: str) -> list[int]:
        return course.patches(self.scene, label, self.grid)


def first_sight() -> Seen:
    torch.set_num_threads(1)  # sums in the same order everywhere
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    scene = course.scene()
    return Seen(pg, scene, explore.look(pg, scene.image, "caption en"))


# ---------------------------------------------------------------------------------------------- the chapters


def figure_1(seen: Seen) -> tuple[Figure, dict[str, str]]:
    """The picture cut up; one patch as pixels; the same patch as a vector."""
    g, patch = seen.grid, course.fullest(seen.scene, "umbrella", seen.grid)
    vision = seen.pg.model.config.vision_config
    size, D = vision.patch_size, vision.hidden_size
    pixels = preprocess(seen.look.picture, vision.image_size)
    row, column = divmod(patch, g)
    of_patch = pixels[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
    with torch.no_grad():
        vector = seen.pg.model.vision_tower.vision_model.embeddings(pixels[None])[0, patch]

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(8.4, 3.1), width_ratios=(1.3, 1, 1))
    show_picture(left, seen.scene.image, g)
    lines(left, g)
    for number in range(g * g):
        left.text(number % g + 0.08, number // g + 0.27, str(number), fontsize=5.5, color=INK)
    framed(left, patch, g, INK)
    left.set_title(f"the picture, cut into {g} x {g} patches")
    middle.imshow(((of_patch + 1) / 2).permute(1, 2, 0).numpy())
    bare(middle)
    middle.set_title(f"patch {patch}: {size} x {size} pixels")
    middle.set_xlabel(f"x 3 colours = {3 * size * size} numbers", color=GREY)
    wide = next(width for width in range(round(D**0.5), 0, -1) if D % width == 0)
    right.imshow(vector.view(-1, wide).numpy(), cmap=OPPOSED, norm=TwoSlopeNorm(0))
    bare(right)
    right.set_title("the same patch as a vector")
    right.set_xlabel(f"{D} numbers, blue: below 0", color=GREY)
    return figure, {
        "picture": str(course.SIZE), "side": str(vision.image_size), "size": str(size), "grid": str(g),
        "patches": str(g * g), "pixels": str(3 * size * size), "width": str(D), "patch": str(patch),
        "shape.pixels": str([1, 3, vision.image_size, vision.image_size]), "shape.patches": str([1, g * g, D]),
        "share": str(course.SIZE // g),
    }  # fmt: skip


def figure_2(seen: Seen) -> tuple[Figure, dict[str, str]]:
    """The cosines of one position with all others; then of every position."""
    g, found = seen.grid, explore.position_similarity(seen.pg.model)
    cosine = found.cosine.numpy()
    patch = 27
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.9))
    maps = cosine.reshape(g * g, g, g)
    left.imshow(maps[patch], cmap=OPPOSED, vmin=-1, vmax=1, extent=(0, g, g, 0))
    lines(left, g)
    framed(left, patch, g, INK)
    bare(left)
    left.set_title(f"how like position {patch} each position is")
    whole = np.full((g * (g + 1) - 1, g * (g + 1) - 1), np.nan)
    for number in range(g * g):
        row, column = number // g * (g + 1), number % g * (g + 1)
        whole[row : row + g, column : column + g] = maps[number]
    shown = right.imshow(whole, cmap=OPPOSED, vmin=-1, vmax=1)
    bare(right)
    right.set_title(f"the same for all {g * g} positions")
    figure.colorbar(shown, ax=(left, right), shrink=0.8, label="cosine", ticks=(-1, 0, 1))
    places = np.stack(np.divmod(np.arange(g * g), g), 1)
    steps = np.abs(places[:, None] - places[None]).sum(-1)  # [P, P], steps from patch to patch
    table = seen.pg.model.vision_tower.vision_model.embeddings.position_embedding.weight
    return figure, {
        "shape": str(list(table.shape)), "patches": str(g * g), "grid": str(g), "width": str(table.shape[1]),
        "next": f"{cosine[steps == 1].mean():.2f}", "two": f"{cosine[steps == 2].mean():.2f}",
        "far": f"{cosine[steps >= g].mean():.2f}", "explained": percent(float(found.explained[:2].sum())),
    }  # fmt: skip


def figure_3(seen: Seen) -> tuple[Figure, dict[str, str]]:
    """One patch painted over: how far the change has spread after some of the vision layers."""
    g, patch, background = seen.grid, course.fullest(seen.scene, "umbrella", seen.grid), seen.grid - 1
    vision, tower = seen.pg.model.config.vision_config, seen.pg.model.vision_tower.vision_model
    size, row, column = vision.patch_size, *divmod(patch, g)
    before = preprocess(seen.look.picture, vision.image_size)[None]
    after = before.clone()
    after[..., row * size : (row + 1) * size, column * size : (column + 1) * size] = before[
        ..., :size, background * size : (background + 1) * size
    ]
    changes = []
    with torch.no_grad():
        x, y = tower.embeddings(before), tower.embeddings(after)
        for layer in [*tower.encoder.layers, None]:
            changes.append(((y - x).norm(dim=-1) / x.norm(dim=-1))[0].view(g, g).numpy())
            x, y = (layer(x), layer(y)) if layer is not None else (x, y)
    L = len(changes) - 1
    shown = sorted({0, 1, L // 2, L})
    figure, many = plt.subplots(1, len(shown), figsize=(8, 2.5))
    for axes, layer in zip(many, shown):
        heat(axes, changes[layer], 0.5, lambda value: f"{100 * value:.0f}" if value >= 0.05 else "", 6)
        axes.set_aspect("equal")
        framed(axes, patch, g, INK)
        axes.set_title({0: "before the layers", 1: "after 1 layer"}.get(layer, f"after {layer} layers"))
    figure.supxlabel("change of each patch's vector, in percent of its length (5 and more)", fontsize=9, color=GREY)
    others = [int((change > 0.05).sum()) - 1 for change in changes]
    own = seen.patches("umbrella")
    gone = {where: explore.without(seen.look, own, where=where).text for where in ("features", "pixels")}
    alone = [explore.without(seen.look, [one], where="pixels").text for one in seen.patches("umbrella")]
    return figure, {
        "patch": str(patch), "layers": str(L), "one": str(others[1]), "half": str(others[L // 2]),
        "middle": str(L // 2), "all": str(others[L]), "shape": str([1, g * g, vision.hidden_size]),
        "of": str(len(alone)), "lost": str(sum("umbrella" not in answer for answer in alone)),
        **{where: f"`{text}`" for where, text in gone.items()},
        **{f"things.{where}": str(len(re.findall(r"\ban? ", text)) - 1) for where, text in gone.items()},
    }  # fmt: skip


def words_of_patches(seen: Seen) -> list[list[str]]:
    """[L + 1][P]: what each patch says in each hidden state."""
    said = explore.lens(seen.look, k=1, columns=seen.look.image_columns.tolist()).ids[:, :, 0].tolist()
    return [[seen.pg.processor.tokenizer.decode([word]).strip() for word in row] for row in said]


def figure_4(seen: Seen) -> tuple[Figure, dict[str, str]]:
    """What each patch says straight from the projector."""
    g, words = seen.grid, words_of_patches(seen)
    labels = [thing.label for thing in seen.scene.objects]
    figure, axes = plt.subplots(figsize=(5.2, 5.2))
    show_picture(axes, seen.scene.image, g, dim=0.45)
    lines(axes, g)
    for patch, word in enumerate(words[0]):
        known = word in labels
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": ORANGE} if known else None
        axes.text(patch % g + 0.5, patch // g + 0.5, word[:9] or "·", ha="center", va="center", fontsize=6,
                  color=INK if known else GREY, fontweight="bold" if known else "normal", bbox=box)  # fmt: skip
    mostly = [
        (patch, label) for label in labels
        for patch in np.flatnonzero(course.shares(seen.scene, label, g) > 0.5).tolist()
    ]  # fmt: skip
    right = [sum(row[patch] == label for patch, label in mostly) for row in words]
    config = seen.pg.model.config
    return figure, {
        "shape": str(list(seen.look.features.shape)), "wide": str(config.vision_config.hidden_size),
        "width": str(config.text_config.hidden_size), "mostly": str(len(mostly)), "right": str(right[0]),
        "late": str(max(right)), "state": str(right.index(max(right))), "columns": str(seen.look.first_answer),
        "patches": str(g * g), "shape.row": str([1, seen.look.first_answer, config.text_config.hidden_size]),
        "image": str(config.image_token_index), "vocabulary": str(config.text_config.vocab_size),
    }  # fmt: skip


def figure_5(seen: Seen) -> tuple[Figure, dict[str, str]]:
    """The mask of the caption, as the model uses it."""
    look = seen.look
    types = look.token_type_ids[None]
    mask = prefix_lm_mask(types, torch.ones_like(types, dtype=torch.bool))[0, 0].numpy()
    S, prefix, image = len(mask), look.first_answer, look.first_text
    figure, axes = plt.subplots(figsize=(5.0, 5.0))
    axes.imshow(mask, cmap=LinearSegmentedColormap.from_list("mask", ["#ffffff", "#9dc6e0"]), extent=(0, S, S, 0))
    bare(axes)
    for place in (image, prefix):
        axes.axhline(place, color=INK, linewidth=0.8)
        axes.axvline(place, color=INK, linewidth=0.8)
    groups = (("patches", 0, image), ("prompt", image, prefix), ("answer", prefix, S))
    for name, start, end in groups:
        axes.text((start + end) / 2, -1, name, ha="center", va="bottom", rotation=0 if end - start > 8 else 45)
        axes.text(-1, (start + end) / 2, name, ha="right", va="center")
    axes.set_xlabel("key: who is looked at")
    axes.set_ylabel("query: who looks", labelpad=48)
    axes.text(image / 2, image / 2, "the prefix sees itself,\nin both directions", ha="center", va="center")
    axes.text(
        image / 2, (prefix + S) / 2, "the answer sees all of the prefix ...", ha="center", va="center", fontsize=8
    )
    axes.annotate("... and of the\nanswer what\nwas written so far", (S - 8, S - 4.5), (S + 3, S - 9), va="center",
                  arrowprops={"arrowstyle": "-", "color": GREY}, annotation_clip=False)  # fmt: skip
    axes.annotate("the prefix does\nnot see the answer", (S - 8, 30), (S + 3, 30), va="center",
                  arrowprops={"arrowstyle": "-", "color": GREY}, annotation_clip=False)  # fmt: skip
    return figure, {
        "S": str(S), "prefix": str(prefix), "answer": str(S - prefix), "patches": str(image),
        "shape": str([1, 1, S, S]), "allowed": percent(mask.mean()), "causal": percent((S + 1) / 2 / S),
    }  # fmt: skip


def figure_6(seen: Seen) -> tuple[Figure, dict[str, str]]:
    """Layers x heads: where the position looks that predicts "umbrella"."""
    found = explore.attention(seen.look)
    weights = found.of(seen.token("umbrella"))  # [L, H, S]
    L, H, S = weights.shape
    g, on_image = seen.grid, weights[:, :, seen.look.image_columns]
    figure, many = plt.subplots(L, H, figsize=(1.35 * H + 0.6, 1.45 * L), squeeze=False)
    for layer, head in np.ndindex(L, H):
        axes, share = many[layer, head], on_image[layer, head].view(g, g).numpy()
        show_picture(axes, seen.scene.image, g, dim=0.35)
        axes.imshow(share, cmap=SCALE, vmin=0, vmax=0.4, extent=(0, g, g, 0), alpha=np.clip(share / 0.12, 0, 0.85))
        axes.set_xlabel(f"{percent(float(on_image[layer, head].sum()))} on the picture", fontsize=7, labelpad=2)
        if head == 0:
            axes.set_ylabel(f"layer {layer}")
        if layer == 0:
            axes.set_title(f"head {head}")
    on_umbrella = weights[:, :, seen.patches("umbrella")].sum(-1)  # [L, H]
    config = seen.pg.model.config.text_config
    return figure, {
        "layers": str(L), "heads": str(H), "last": str(L - 1), "queries": str(len(found.queries)), "columns": str(S),
        "shape": str(list(found.weights.shape)), "late": percent(float(on_umbrella[-3:].mean())),
        "first": percent(float(on_umbrella[0].mean())), "prefix": str(seen.look.first_answer),
        "size": str(config.head_dim),
        "shape.keys": str([1, config.num_key_value_heads, seen.look.first_answer, config.head_dim]),
    }  # fmt: skip


def figure_7(seen: Seen) -> tuple[Figure, dict[str, str]]:
    """Left, who gets attention; right, whose absence costs anything."""
    look = seen.look
    share = explore.attention(look).share().mean((1, 2)).numpy()  # [L, 5], mean of heads and queries
    S, layers = len(look.input_ids), range(look.num_layers)
    bos = explore.cut(look, [query for query in range(S) if query != look.first_text], [look.first_text], layers).drop
    image = explore.cut(look, range(look.first_text, S), look.image_columns.tolist(), layers).drop
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), width_ratios=(1, 1.25))
    heat(left, share, 1.0, percent)
    left.set_xticks(np.arange(5) + 0.5, ["picture", "<bos>", "prompt", "newline", "answer\nso far"], fontsize=7.5)
    left.set_yticks(np.arange(len(share)) + 0.5, [f"layer {layer}" for layer in layers])
    left.set_title("share of attention")
    places = np.arange(len(bos))
    right.barh(places - 0.2, image.numpy(), 0.4, color=ORANGE, label="no text sees the picture")
    right.barh(places + 0.2, bos.numpy(), 0.4, color=BLUE, label="nothing sees <bos>")
    right.set_yticks(places, [token.strip() or "newline" for token in look.tokens[look.first_answer :]], fontsize=7.5)
    right.invert_yaxis()
    right.set_xlabel("log-probability lost (nats)")
    right.set_title("what each word of the answer loses")
    right.legend(fontsize=8)
    return figure, {
        "share": percent(share[0, 1]), "most": f"{float(bos.max()):.2f}", "total": f"{float(bos.sum()):.2f}",
        "image": f"{float(image.sum()):.0f}", "picture": percent(share[0, 0]), "layers": str(len(share)),
        "shape": str(list(bos.shape)),
    }  # fmt: skip


def figure_8(seen: Seen, count: int = 9) -> tuple[Figure, dict[str, str]]:
    """States x columns: what each column would say after each layer."""
    look = seen.look
    columns = list(range(look.first_answer - 1, look.first_answer - 1 + count))
    found, decode = explore.lens(look, k=1, columns=columns), seen.pg.processor.tokenizer.decode
    words = [[decode([word]) for word in row] for row in found.ids[:, :, 0].tolist()]
    right = (found.ranks == 0).numpy()  # [L + 1, C]
    sure = found.logprobs[:, :, 0].exp().numpy()
    figure, axes = plt.subplots(figsize=(8, 3.3))
    heat(axes, np.where(right, 0.2 + 0.3 * sure, 0.0), 1.0)
    for state, column in np.ndindex(*right.shape):
        word = words[state][column]
        itself = word == look.tokens[columns[column]]
        shown = word.replace("\n", "newline").strip()[:10] or "·"
        axes.text(column + 0.5, state + 0.5, shown, ha="center", va="center", fontsize=7.5,
                  color=BLUE if itself else INK, fontweight="bold" if right[state, column] else "normal")  # fmt: skip
    names = [look.tokens[column].replace("\n", "newline").strip() for column in columns]
    axes.set_xticks(np.arange(count) + 0.5, names)
    axes.set_yticks(np.arange(len(words)) + 0.5, [f"state {state}" for state in range(len(words))])
    axes.set_xlabel("what stands in the column; each predicts the next one's token")
    axes.set_title("blue: the column's own token; orange field: the token that comes next")
    text = explore.lens(look, k=1)
    own = text.ids[0, :, 0] == look.input_ids[text.columns]
    book = found.ranks[:, columns.index(look.query_of(seen.token("book")))]
    return figure, {
        "states": str(len(words)), "last": str(len(words) - 1), "own": str(int(own.sum())), "of": str(len(own)),
        "book": str(int((book == 0).nonzero()[0, 0])), "layers": str(look.num_layers),
        "shape.hidden": str(list(look.hidden_states[0].shape)),
        "vocabulary": str(seen.pg.model.config.text_config.vocab_size),
    }  # fmt: skip


QUESTIONS = ("answer en what color is the umbrella ?", "answer en is there a book ?")


def figure_9(seen: Seen) -> tuple[Figure, dict[str, str]]:
    """Two questions: what each cut takes away, by layer."""
    shown = {"image->prompt": GREEN, "image->last": ORANGE, "prompt->last": BLUE}
    figure, many = plt.subplots(1, 2, figsize=(8, 3.3), sharey=True)
    numbers = {}
    for axes, question, key in zip(many, QUESTIONS, ("color", "there")):
        look = explore.look(seen.pg, seen.scene.image, question)
        found = explore.routes(look, 0)
        for (name, color), style in zip(shown.items(), ("o-", "s-", "^-")):
            change = found.change[found.names.index(name)].numpy()
            axes.plot(
                change, style, color=color, label=name.replace("image", "picture").replace("->", " → "), clip_on=False
            )
            numbers[f"{key}.{name.replace('->', '.')}"] = percent(max(change.max(), 0))
            numbers[f"{key}.{name.replace('->', '.')}.layer"] = str(int(change.argmax()))
        axes.set_title(f"{question.removeprefix('answer en ')}  ({look.answer})")
        axes.set_ylim(-0.05, 1.05)
        axes.set_xlabel("layer around which the route is cut")
    many[0].set_ylabel("share of the answer lost")
    cow = explore.look(seen.pg, seen.scene.image, "answer en is there a cow ?")
    absent = explore.routes(cow, 0)
    of_picture = [change for name, change in zip(absent.names, absent.change) if name.startswith("image->")]
    # Which column of the prompt needs the picture: it is kept from one column at a time, in all layers.
    kept = {
        column: 1
        - float(torch.exp(-explore.cut(look, [column], look.image_columns.tolist(), range(look.num_layers)).drop[0]))
        for column in look.groups()["prompt"]
    }
    book = next(column for column in kept if look.tokens[column].strip() == "book")
    others = max(abs(change) for column, change in kept.items() if column != book)
    numbers |= {"there.book": percent(kept[book]), "there.others": percent(others)}
    numbers |= {"no": cow.answer, "no.image": percent(float(torch.stack(of_picture).abs().max()))}
    figure.legend(*many[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure, {**numbers, "shape": str(list(found.change.shape)), "layers": str(found.change.shape[1])}


def figure_10(seen: Seen) -> tuple[Figure, dict[str, str]]:
    """Twins that differ in one colour, and where the difference stands before each layer."""
    twin = course.scene("blue")
    red, blue = (
        explore.look(seen.pg, scene.image, QUESTIONS[0], tint)
        for scene, tint in ((seen.scene, "red"), (twin, "blue"))
    )  # fmt: skip
    umbrella = seen.patches("umbrella")
    groups = {
        "patches of the umbrella": umbrella,
        "all other patches": [patch for patch in range(seen.grid**2) if patch not in umbrella],
        "the last column": red.groups(0)["last"],
    }
    found = explore.patch(red, blue, token=0, groups=groups)
    figure, many = plt.subplots(1, 3, figsize=(8, 2.8), width_ratios=(1, 1, 1.7))
    for axes, scene, name in ((many[0], seen.scene, "a: red"), (many[1], twin, "b: blue")):
        show_picture(axes, scene.image, seen.grid)
        axes.set_title(name)
    for name, values, color, style in zip(found.names, found.restored, (ORANGE, GREY, BLUE), ("o-", "x-", "s-")):
        many[2].plot(values.numpy(), style, color=color, label=name, clip_on=False)
    many[2].set_xlabel("layer before which a's state is put into b")
    many[2].set_title("how much of 'red' comes back")
    many[2].legend(fontsize=7.5, loc="center left")
    many[2].set_ylim(-0.05, 1.05)
    object_, others, last = found.restored
    return figure, {
        "first": percent(float(object_[0])), "object": percent(float(object_[-1])), "last": percent(float(last[-1])),
        "others": percent(float(others.abs().max())), "layer": str(found.restored.shape[1] - 1),
        "umbrella": str(len(umbrella)), "patches": str(seen.grid**2), "start": percent(float(last[0].abs())),
        "shape": str(list(found.restored.shape)),
    }  # fmt: skip


def figure_11(seen: Seen) -> tuple[Figure, dict[str, str]]:
    """The four distributions of a box, along the borders of the picture."""
    look = explore.look(seen.pg, seen.scene.image, "detect umbrella")
    edges = {edge.name: edge for edge in explore.locations(look)[:4]}
    pixel = course.SIZE / 1024
    figure, axes = plt.subplots(2, 2, figsize=(5.4, 5.4), width_ratios=(1, 5), height_ratios=(1, 5),
                                gridspec_kw={"wspace": 0.02, "hspace": 0.02})  # fmt: skip
    axes[0, 0].set_axis_off()
    picture = axes[1, 1]
    picture.imshow(seen.scene.image, extent=(0, course.SIZE, course.SIZE, 0))
    bare(picture)
    left, right, top, bottom = (edges[name].pixels for name in ("x0", "x1", "y0", "y1"))
    picture.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=INK, linewidth=1.5))
    numbers = {}
    truth = next(thing for thing in seen.scene.objects if thing.label == "umbrella").box
    for name, color in (("x0", BLUE), ("x1", ORANGE), ("y0", BLUE), ("y1", ORANGE)):
        edge = edges[name]
        used = edge.mass.numpy() > 1e-4
        places, heights = (np.arange(1024) * pixel)[used], edge.mass.numpy()[used]
        beside = axes[0, 1] if name[0] == "x" else axes[1, 0]
        (beside.bar if name[0] == "x" else beside.barh)(places, heights, 3.2, color=color, label=name)
        numbers[f"{name}.mean"] = f"{edge.pixels:.0f}"
        numbers[f"{name}.spread"] = f"{edge.pixel_spread:.1f}"
        numbers[f"{name}.true"] = f"{truth[('x0', 'y0', 'x1', 'y1').index(name)]:.0f}"
    for beside in (axes[0, 1], axes[1, 0]):
        bare(beside)
        for spine in beside.spines.values():
            spine.set_visible(False)
        beside.legend(fontsize=7.5, handlelength=1)
    axes[0, 1].set_xlim(0, course.SIZE)
    axes[1, 0].set_ylim(course.SIZE, 0)
    axes[1, 0].invert_xaxis()
    inside = [edge for seed in range(20) for edge in within_two_spreads(seen.pg, seed)]
    trained = len(explore.loc_similarity(seen.pg.model).ids)
    token = look.tokens[look.first_answer]
    return figure, {
        **numbers, "edges": str(len(inside)), "inside": percent(float(np.mean(inside))), "token": f"`{token}`",
        "bin": str(int(token[4:-1])), "trained": str(trained),
        "picture": str(course.SIZE), "step": str(1024 // trained), "pixel": f"{1024 / course.SIZE:.2f}",
    }  # fmt: skip


def within_two_spreads(pg: paligemma.PaliGemma, seed: int) -> list[bool]:
    """For every edge of the objects of a scene that are alone of their kind: does the truth lie within two spreads?"""
    scene = render(seed, "test")
    labels = [thing.label for thing in scene.objects]
    found = []
    for thing in scene.objects:
        if thing.label == "sign" or labels.count(thing.label) > 1:
            continue
        for detection in pg.detect(scene.image, [thing.label])[:1]:
            mean, spread = detection.edges.T  # x0, y0, x1, y1 in pixels
            found += (np.abs(mean - np.array(thing.box)) <= 2 * spread).tolist()
    return found


def figure_12(seen: Seen) -> tuple[Figure, dict[str, str]]:
    """Every tensor of the flow: how many numbers it has here and in an official model."""
    stages = explore.flow(seen.pg, seen.scene.image, "caption en")
    config, own = published_config("paligemma2-3b", 448), seen.pg.model.config
    P, S, text = config.vision_config.num_patches, config.vision_config.num_patches + 4, config.text_config
    official = {
        "pixel_values": 3 * config.vision_config.image_size**2, "input_ids": S,
        "patches": P * config.vision_config.hidden_size, "image_features": P * text.hidden_size,
        "inputs_embeds": S * text.hidden_size, "mask": S * S, "hidden": text.hidden_size,
        "keys": text.num_key_value_heads * S * text.head_dim, "logits": text.vocab_size, "token": 1,
    }  # fmt: skip
    tiny = {name: int(np.prod(shape)) for stage in reversed(stages) for name, shape in stage.shapes.items()}
    names = list(official)
    figure, axes = plt.subplots(figsize=(7, 3.8))
    places = np.arange(len(names))
    axes.hlines(places, [tiny[name] for name in names], [official[name] for name in names], color=PALE, linewidth=3)
    axes.plot([tiny[name] for name in names], places, "o", color=BLUE, label="the small model")
    axes.plot([official[name] for name in names], places, "s", color=ORANGE, label="paligemma2-3b at 448 pixels")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("numbers in the tensor")
    axes.legend(fontsize=8, loc="center left")
    parameters = sum(parameter.numel() for parameter in seen.pg.model.parameters())
    return figure, {
        "parameters": f"{parameters / 1e6:.1f}", "layers": str(own.text_config.num_hidden_layers),
        "official.layers": str(text.num_hidden_layers), "official.heads": str(text.num_attention_heads),
        "heads": str(own.text_config.num_attention_heads),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- writing


DRAWN = {number: globals()[f"figure_{number}"] for number in range(1, 13)}


def draw(number: int, seen: Seen, folder: Path) -> dict[str, str]:
    """Draws a chapter's figure into the folder, as 01.png, and returns the chapter's numbers."""
    with plt.rc_context(STYLE):
        figure, numbers = DRAWN[number](seen)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140, bbox_inches="tight", pad_inches=0.12)
        plt.close(figure)
    picture = Image.open(buffer).convert("RGB")  # without the alpha channel: white in dark mode too
    picture.quantize(256, kmeans=4, dither=Image.Dither.NONE).save(folder / f"{number:02d}.png", optimize=True)
    return numbers


def chapter(number: int) -> Path:
    (found,) = CHAPTERS.glob(f"{number:02d}-*.md")
    return found


def renewed(text: str, numbers: dict[str, str]) -> str:
    """A chapter's text with each number in front of its name. Raises KeyError for a name that no number has."""
    return NUMBER.sub(lambda found: f"{numbers[found[2]]}<!--{found[2]}-->", text)


def main() -> None:
    wanted = [int(word) for word in sys.argv[1:]] or list(DRAWN)
    file = FIGURES / "numbers.json"
    numbers = json.loads(file.read_text("utf-8")) if file.exists() else {}
    seen = first_sight()
    for number in wanted:
        numbers[f"{number:02d}"] = draw(number, seen, FIGURES)
        for path in CHAPTERS.glob(f"{number:02d}-*.md"):
            path.write_text(renewed(path.read_text("utf-8"), numbers[f"{number:02d}"]), "utf-8")
    file.write_text(json.dumps(dict(sorted(numbers.items())), indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
