"""Look inside the model: what it attends to, what its patches say, what each part of the picture is needed for.

    from paligemma import explore

    look = explore.look(pg, "photo.jpg", "caption en")      one pass over picture, prompt and answer
    explore.attention(look).of(3)                           who the query of answer token 3 looks at
    explore.lens(look)                                      what each position would say after each layer
    explore.knock_out(look)                                 which patches a word needs
    explore.page(look, "look.html")                         all of it, to click through

Nothing here is a second implementation of the model. The real modules run, and what must be changed on the way is
changed by hooks, which are removed whatever happens. All results are tensors on the CPU, float32 or int64.

Read `watching.py` first: everything else starts from the `Look` that it makes.
"""

from paligemma.explore.attending import Attention, VisionAttention, attention, vision_attention
from paligemma.explore.changing import Cut, KnockOut, cut, knock_out, without
from paligemma.explore.reading import Edge, Lens, Similarity, lens, loc_similarity, locations, position_similarity
from paligemma.explore.rendering import page
from paligemma.explore.stages import Stage, flow
from paligemma.explore.tracing import Patching, Routes, patch, routes
from paligemma.explore.watching import Look, look

__all__ = [
    "Attention",
    "Cut",
    "Edge",
    "KnockOut",
    "Lens",
    "Look",
    "Patching",
    "Routes",
    "Similarity",
    "Stage",
    "VisionAttention",
    "attention",
    "cut",
    "flow",
    "knock_out",
    "lens",
    "loc_similarity",
    "locations",
    "look",
    "page",
    "patch",
    "position_similarity",
    "routes",
    "vision_attention",
    "without",
]
