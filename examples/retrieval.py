"""Trains `colpali.py` on pictures of the small world, measures how often it finds the right one, and draws why.

    python examples/retrieval.py --out runs/retrieval        # trains for 12 minutes of processor time, then measures
    python examples/retrieval.py --model runs/retrieval      # measures and draws a model that was trained before

A page is a picture with a sign and two to four objects. A query asks for its objects, for the text on its sign, or
for both. A step of training shows new pages with a query for each, and every query shall score its own page above all
others of the batch. The vision tower stays as it is; projector, language model and `custom_text_proj` are trained.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import colpali
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import paligemma
from paligemma.evaluate.intervals import wilson
from paligemma.tiny.renderer import render
from paligemma.tiny.rows import article, listed, plural
from paligemma.tiny.world import Scene

KINDS = ("objects", "text", "both")
NUMBERS = ("", "a", "two", "three", "four")


# --- pages and queries ------------------------------------------------------------------------------


def page(seed: int, split: str) -> Scene:
    """The page of a seed: two to four objects, and a sign with three to six letters or digits."""
    return render(seed, split, objects=(2, 4), sign=1.0, sign_only=0.0, text_length=(3, 6))


def query(scene: Scene, kind: str, rng: np.random.Generator) -> str:
    """What asks for this page: "two dogs and a red car", "a sign that says STOP", or both. The order is random, so
    that it tells nothing about where the objects lie."""
    names = [(thing.tint, thing.label) for thing in scene.objects if thing.label != "sign"]
    parts = []
    for tint, label in dict.fromkeys(names):
        count = names.count((tint, label))
        words = f"{tint} " * bool(tint) + (label if count == 1 else plural(label))
        parts.append(article(words) if count == 1 else f"{NUMBERS[count]} {words}")
    text = f"a sign that says {scene.sign.text}"
    parts = {"objects": parts, "text": [text], "both": [*parts, text]}[kind]
    return listed([parts[i] for i in rng.permutation(len(parts))])


# --- training ---------------------------------------------------------------------------------------


def loss_of(scores: Tensor) -> Tensor:
    """The loss of the scores [N, N] of N queries (rows) and N pages, of which page i is right for query i.

    ColPali (arXiv 2407.01449) takes the softplus of the best wrong score less the right one. Here logsumexp stands for
    the best, its smooth form, which makes it the cross entropy over the pages of the batch. All wrong pages teach then,
    not one: with the best alone, short trials seemed to stall at ln 2, which is the loss of equal scores.
    """
    right = scores.diagonal()
    wrong = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool, device=scores.device), -math.inf)
    return F.softplus(wrong.logsumexp(1) - right).mean()


def train(pg: paligemma.PaliGemma, seconds: float, batch: int, lr: float, tell: Callable[[str], None]) -> list[float]:
    """Trains the model in place for so many seconds of processor time. Returns the loss of each step."""
    model, rng = pg.model, np.random.default_rng(0)
    model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.01)
    begin, losses, done = time.process_time(), [], 0.0
    while done < 1:
        scenes = [page(len(losses) * batch + i, "train") for i in range(batch)]
        texts = [query(scene, KINDS[rng.integers(len(KINDS))], rng) for scene in scenes]
        found = colpali.scores(colpali.queries(pg, texts), colpali.pages(pg, [s.image for s in scenes], batch))
        loss = loss_of(found)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1, len(losses) / 20, 1.25 * (1 - done))  # a start, then down to 0
        optimizer.step()
        losses.append(loss.item())
        done = (time.process_time() - begin) / seconds
        if len(losses) % 20 == 0:
            tell(f"step {len(losses)}, {done:4.0%} of the time, loss {np.mean(losses[-20:]):.3f}")
    return losses


# --- measuring --------------------------------------------------------------------------------------


def recall_at_1(scores: Tensor) -> float:
    """Share of the queries (rows) that score their own page (same number) above every other. A tie counts as wrong."""
    others = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool, device=scores.device), -math.inf)
    return (scores.diagonal() > others.amax(1)).float().mean().item()


@torch.inference_mode()
def evaluate(pg: paligemma.PaliGemma, count: int) -> dict[str, float]:
    """Recall@1 of each kind of query over the first `count` pages of the split "test", which training never shows."""
    scenes = [page(seed, "test") for seed in range(count)]
    vectors = colpali.pages(pg, [scene.image for scene in scenes], batch=20)
    rng = np.random.default_rng(0)
    texts = {kind: [query(scene, kind, rng) for scene in scenes] for kind in KINDS}
    return {kind: recall_at_1(colpali.scores(colpali.queries(pg, texts[kind]), vectors)) for kind in KINDS}


def table(untrained: dict[str, float], trained: dict[str, float], count: int) -> str:
    lines = [f"{'asked for':12}{'chance':>8}{'untrained':>11}{'trained':>9}  95% interval"]
    for kind in KINDS:
        low, high = wilson(round(trained[kind] * count), count)
        lines += [f"{kind:12}{1 / count:8.2f}{untrained[kind]:11.2f}{trained[kind]:9.2f}  {low:.2f} to {high:.2f}"]
    return "\n".join(lines)


# --- the picture ------------------------------------------------------------------------------------


def words_of(pg: paligemma.PaliGemma, text: str) -> dict[str, list[int]]:
    """The words of a query that say what to look for, each with the places of its tokens among the query's vectors."""
    token = pg.processor.tokenizer
    words: list[tuple[str, list[int]]] = []
    for place, piece in enumerate((token.decode([i]) for i in token.encode(colpali.QUERY.format(text))), 1):  # 0: <bos>
        if piece.startswith(" ") or not words:
            words.append(("", []))
        words[-1] = (words[-1][0] + piece.strip(" ,"), [*words[-1][1], place])
    return {word: places for word, places in words if word not in ("Query:", "a", "an", "and", "that", "says")}


@torch.inference_mode()
def draw(pg: paligemma.PaliGemma, scene: Scene, text: str, file: Path) -> None:
    """A PNG of the page, and for each word of the query how similar its tokens are to each patch, on average. The best
    patch of each token is framed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        sys.exit("error: the picture needs matplotlib: pip install matplotlib")
    patches = pg.processor.num_image_tokens
    grid = math.isqrt(patches)
    similar = (colpali.queries(pg, [text])[0] @ colpali.pages(pg, [scene.image])[0, :patches].T).cpu()  # [S, P]
    words = words_of(pg, text)
    columns = min(4, 1 + len(words))
    rows = -(-(1 + len(words)) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.35 * rows), layout="constrained")
    figure.suptitle(f'"{text}"', fontsize=10)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.axis("off")
    panels[0].imshow(scene.image, extent=(0, grid, grid, 0))
    panels[0].set_title("the page found", fontsize=9)
    for panel, (word, places) in zip(panels[1:], words.items()):
        heat = similar[places].mean(0).view(grid, grid).numpy()
        panel.imshow(scene.image.mean(-1), cmap="gray", vmin=-150, vmax=255, extent=(0, grid, grid, 0))
        panel.imshow(heat, cmap="inferno", alpha=0.55, extent=(0, grid, grid, 0), interpolation="nearest")
        for best in {int(similar[place].argmax()) for place in places}:
            corner = (best % grid, best // grid)
            panel.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#00e0ff", linewidth=1.8))
        panel.set_title(word, fontsize=9)
    figure.savefig(file, dpi=75)


# --- the command ------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval"), help="folder for the trained model")
    parser.add_argument("--model", type=Path, help="measure this one, trained before, instead of training")
    parser.add_argument("--minutes", type=float, default=12, help="of processor time, all threads together")
    parser.add_argument("--batch", type=int, default=16, help="pages in a step")
    parser.add_argument("--lr", type=float, default=5e-4, help="highest learning rate")
    parser.add_argument("--pages", type=int, default=100, help="pages to search in")
    parser.add_argument("--show", type=int, default=0, help="number of the page to draw")
    parser.add_argument("--picture", type=Path, default=Path("retrieval.png"), help="file to draw to")
    options = parser.parse_args()
    if options.model is None and options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty: name another folder with --out, or --model {options.out} to use it")
    torch.manual_seed(0)
    pg = colpali.load("tiny", 256, dtype="float32")
    untrained = evaluate(pg, options.pages)
    if options.model is None:
        train(pg, 60 * options.minutes, options.batch, options.lr, lambda line: print(line, file=sys.stderr))
        paligemma.save_pretrained(pg.model, options.out, pg.processor, extra=["custom_text_proj"])
    else:
        pg = colpali.load(str(options.model), 256, dtype="float32")
    print(f"recall@1 over {options.pages} pages, {options.pages} queries of each kind", file=sys.stderr)
    print(table(untrained, evaluate(pg, options.pages), options.pages))
    scene = page(options.show, "test")
    text = query(scene, "both", np.random.default_rng(options.show))
    draw(pg, scene, text, options.picture)
    print(f'"{text}" drawn into {options.picture}', file=sys.stderr)


if __name__ == "__main__":
    main()
