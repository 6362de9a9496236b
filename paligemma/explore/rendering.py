"""A look as one HTML file that needs nothing else: no network, no server, no build step.

The numbers go into the file as they are, deflated and in base64; `view.js` draws them. Attention weights are kept as
the square root in 8 bits: an error of at most .004, where small weights keep their digits. What makes a page too large
are the weights on patches: then 2 x 2 or 4 x 4 patches share one number, and then only the mean of all heads and the
eight heads whose share on the picture varies most are kept. The page says so.

Letters: L layers, H heads, A answer tokens, n images, g grid, P patches of an image, T text columns.
"""

from __future__ import annotations

import base64
import html
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from paligemma.explore.attending import attention
from paligemma.explore.changing import knock_out as knock_out_patches
from paligemma.explore.reading import lens, locations
from paligemma.explore.stages import Stage, duration, flow
from paligemma.explore.tracing import check_same_prompt, patch
from paligemma.explore.tracing import routes as routes_of
from paligemma.explore.watching import Look
from paligemma.files import write_text

HERE = Path(__file__).parent
PICTURE_SIDE = 448  # pixels of the longer side in the page
MOST_ROUTES = 3  # answer tokens whose routes are computed
BEST_HEADS = 8

# Which screen shows what a stage makes.
SCREENS = {
    "vision layers": "words",
    "norm and projector": "words",
    "decoder layers (prefill)": "attention",
    "head": "routes",
    "choose": "locations",
    "embed, put the picture in": "knock-out",
}

Arrays = dict[str, np.ndarray]


def page(
    look: Look,
    path: str | Path,
    max_bytes: int = 8_000_000,
    compare: Look | None = None,
    knock_out: bool = True,
    window: int = 3,
    progress: Callable[[int, int], object] | None = None,
    routes: bool = True,
    grid: int | None = None,
    stages: list[Stage] | None = None,
) -> dict[str, str]:
    """Writes the page. Returns what was left out or made coarser, and why: {what: why}, empty if nothing was.

    compare: a look at another picture with the same prompt; adds the screen that puts hidden states of `look` into it.
    knock_out: compute what each patch is needed for, one pass for each. window: of patches and of layers.
    progress: called with (passes done, all). routes: compute them, some hundred passes in a model of 26 layers.
    grid: knock out grid x grid blocks of each image instead, one pass for each; see `knock_out`.
    stages: what `flow` returned for this row, if it has run already.
    Raises ValueError where even the coarsest page is larger than max_bytes.
    """
    left_out: dict[str, str] = {}
    weights = attention(look, "answer").weights  # [L, H, A, S]; first, since it may be refused
    if stages is None:
        stages = flow(look.pg, look.picture, look.prompt)
    meta, arrays = _what_never_changes(look, window, stages)
    meta["knock_out_grid"] = look.grid if grid is None else grid
    if compare is not None:
        _add_comparison(look, compare, meta, arrays)  # before the knock-outs, since it may be refused
    if knock_out:
        arrays["drop"] = knock_out_patches(look, window, progress=progress, grid=grid).drop.numpy()
        if grid is not None:
            left_out["knock-out"] = f"of {grid} x {grid} blocks of patches, not of every patch"
    else:
        time = duration(stages, look.images * look.grid**2)
        left_out["knock-out"] = f"not computed: it takes a pass of the model for every patch, {time}"
    if not routes:
        left_out["routes"] = "not computed: each takes a pass of the model for every layer"
    _add_routes(look, meta, arrays, window, MOST_ROUTES if routes else 0)
    every, best = list(range(weights.shape[1])), _best_heads(weights, look)
    pools = [pool for pool in (1, 2, 4) if look.grid % pool == 0]
    tries = [(pool, every) for pool in pools]
    if best != every:
        tries += [(pool, best) for pool in pools[1:] or pools]
    for pool, heads in tries:
        found = dict(left_out)
        if pool > 1:
            found["attention"] = f"{pool} x {pool} patches share one number, to keep the page small"
        if len(heads) < weights.shape[1]:
            found["heads"] = f"{len(heads)} of {weights.shape[1]} heads are kept; the mean is that of all"
        rows = torch.cat([weights.mean(1, keepdim=True), weights[:, heads]], dim=1)  # the mean first
        arrays["attention"] = _as_bytes(_keys(rows, look, pool))  # [L, 1 + H, A, S']
        kept = {"heads": heads, "pool": pool, "attention_patches": look.images * (look.grid // pool) ** 2}
        text = _fill_in({**meta, **kept, "left_out": found}, arrays, compare is not None, look)
        if len(text.encode()) <= max_bytes:
            write_text(Path(path), text)
            return found
    raise ValueError(
        f"the page would have {len(text.encode()):,} bytes, at most {max_bytes:,} were asked for: raise max_bytes "
        "(--max-mb, in millions)"
    )


# ---------------------------------------------------------------------------------------------- what is shown


def _what_never_changes(look: Look, window: int, stages: list[Stage]) -> tuple[dict[str, Any], Arrays]:
    on_patches = lens(look, k=1, columns=look.image_columns.tolist())  # [L + 1, n * P, 1]
    ids = on_patches.ids[..., 0]
    used = ids.unique()
    edges = locations(look)
    decode = look.pg.processor.tokenizer.decode
    text = [token for token in look.tokens if token != "<image>"]
    meta = {
        "answer": look.tokens[look.first_answer :],
        "text": text,
        "layers": look.num_layers,
        "grid": look.grid,
        "images": look.images,
        "patches": look.images * look.grid**2,
        "window": window,
        "pictures": [_data_url(picture) for picture in look.pictures],
        "words": [decode([id]) for id in used.tolist()],
        "edges": [
            {"box": i // 4, "name": e.name, "mean": e.mean, "pixels": e.pixels, "pixel_spread": e.pixel_spread}
            for i, e in enumerate(edges)
        ],
        "flow": [
            {"name": s.name, "file": s.file, "calls": s.calls, "shapes": s.shapes, "ms": s.ms,
             "screen": SCREENS.get(s.name, "flow")}
            for s in stages
        ],
        "compare": None,
    }  # fmt: skip
    mass = torch.stack([edge.mass for edge in edges]) if edges else torch.empty(0, 1024)
    arrays = {
        "logprobs": look.logprobs.numpy(),
        "words": torch.searchsorted(used, ids).numpy().astype(np.uint16 if len(used) <= 2**16 else np.uint32),
        "word_probability": _as_bytes(on_patches.logprobs[..., 0].exp()),
        "mass": _as_bytes(mass),
    }
    return meta, arrays


def _add_routes(look: Look, meta: dict[str, Any], arrays: Arrays, window: int, most: int) -> None:
    """Of the answer tokens that need the picture most; without knock-outs, of the first."""
    need = torch.from_numpy(arrays["drop"]).amax(0) if "drop" in arrays else -torch.arange(len(look.answer_ids)).float()
    chosen = need.topk(min(most, len(need))).indices.sort().values.tolist() if len(need) else []
    found = [routes_of(look, token, window) for token in chosen]
    meta["routes"] = [{"token": token, "names": route.names} for token, route in zip(chosen, found)]
    flat = [route.change.flatten() for route in found]
    arrays["routes"] = (torch.cat(flat) if flat else torch.empty(0)).numpy()


def _add_comparison(a: Look, b: Look, meta: dict[str, Any], arrays: Arrays) -> None:
    """Hidden states of a put into b, at the first answer token in which they differ."""
    check_same_prompt(a, b)
    ids_a, ids_b = a.answer_ids.tolist(), b.answer_ids.tolist()
    differs = [token for token, (one, other) in enumerate(zip(ids_a, ids_b)) if one != other]
    if not differs:
        same = a.answer == b.answer
        said = f"both {a.answer!r}" if same else f"{a.answer!r} and {b.answer!r}, one the beginning of the other"
        raise ValueError(f"the pictures are answered {said}: there is no word in which they differ")
    token = differs[0]
    found = patch(_up_to(a, token), _up_to(b, token), token, patches=True)
    assert found.per_patch is not None
    one, other = _piece(a, token), _piece(b, token)
    said = f"This picture says {one!r}, the other {other!r}: how much of {one!r} comes back in the other one"
    meta["compare"] = {"names": found.names, "said": said + "."}
    arrays["restored"] = found.restored.numpy()
    arrays["per_patch"] = found.per_patch.numpy()


def _up_to(look: Look, token: int) -> Look:
    """The look, of an answer that ends with this token. What stands before a token does not depend on what follows."""
    end = look.first_answer + token + 1
    return replace(
        look,
        answer=look.pg.processor.tokenizer.decode(look.answer_ids[: token + 1].tolist()),
        input_ids=look.input_ids[:end],
        token_type_ids=look.token_type_ids[:end],
        tokens=look.tokens[:end],
        hidden_states=[state[:end] for state in look.hidden_states],
        logprobs=look.logprobs[: token + 1],
    )


def _piece(look: Look, token: int) -> str:
    """The text of an answer token. Of a byte, which is no text by itself, its name in the vocabulary: "<0xE6>"."""
    text = look.tokens[look.first_answer + token]
    if text != "\N{REPLACEMENT CHARACTER}":
        return text
    return look.pg.processor.tokenizer.backend.id_to_token(int(look.answer_ids[token])) or text


def _keys(weights: Tensor, look: Look, pool: int) -> Tensor:
    """[L, H, A, S] -> [L, H, A, patches / pool^2 + T]: pooled patches are summed; text columns follow."""
    columns = look.image_columns
    g = look.grid // pool
    on_patches = weights[..., columns].unflatten(-1, (look.images, g, pool, g, pool)).sum((-1, -3)).flatten(-3)
    is_text = torch.ones(weights.shape[-1], dtype=torch.bool)
    is_text[columns] = False
    return torch.cat([on_patches, weights[..., is_text]], dim=-1)


def _best_heads(weights: Tensor, look: Look) -> list[int]:
    """Those whose share on the picture varies most over layers and tokens."""
    share = weights[..., look.image_columns].sum(-1).transpose(0, 1).flatten(1)  # [H, L * A]
    most = min(BEST_HEADS, len(share))
    if not share.numel():  # an empty answer
        return list(range(most))
    return share.std(-1, correction=0).topk(most).indices.sort().values.tolist()


# ---------------------------------------------------------------------------------------------- the file


def _as_bytes(shares: Tensor) -> np.ndarray:
    """Numbers in [0, 1] as the square root in 8 bits."""
    return (255 * shares.clamp(0, 1).sqrt()).round().to(torch.uint8).numpy()


def _data_url(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _fill_in(meta: dict[str, Any], arrays: Arrays, compares: bool, look: Look) -> str:
    packed, table = bytearray(), {}
    for name, array in arrays.items():
        packed += b"\0" * (-len(packed) % 4)  # a float32 array begins at a multiple of 4
        table[name] = {"dtype": str(array.dtype), "shape": array.shape, "offset": len(packed), "bytes": array.nbytes}
        packed += np.ascontiguousarray(array).tobytes()
    # "<" in a token or prompt could end the script; as an escape it is the same JSON.
    as_json = json.dumps({**meta, "arrays": table}).replace("<", "\\u003c")
    about = f"{look.pg!r}. Answer: {look.answer!r}."
    if meta["left_out"]:
        about += " Left out: " + "; ".join(f"{what}: {why}" for what, why in meta["left_out"].items()) + "."
    values = {
        "title": html.escape(f"{look.prompt} \N{RIGHTWARDS ARROW} {look.answer}"[:120]),
        "about": html.escape(about),
        "css": (HERE / "view.css").read_text(encoding="utf-8"),
        "js": (HERE / "view.js").read_text(encoding="utf-8"),
        "window": str(meta["window"]),
        "compare_link": '<a href="#compare" data-screen="compare">Compare</a>' if compares else "",
        "compare_section": (HERE / "compare.html").read_text(encoding="utf-8") if compares else "",
        "meta": as_json,
        "arrays": base64.b64encode(zlib.compress(bytes(packed), 9)).decode(),
    }
    parts = (HERE / "view.html").read_text(encoding="utf-8").split("{{")  # one pass: no value is looked into
    return parts[0] + "".join(values[name] + rest for name, rest in (part.split("}}", 1) for part in parts[1:]))
