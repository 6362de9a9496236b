"""Greedy answers in float32 are those of `pg.generate`, however many requests run together."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import SCENE, data_url, picture

PROMPTS = [
    "caption en", "ocr", "detect book ; house", "segment house", "answer en how many dogs are there?", "detect dog",
]  # fmt: skip
BUDGETS = [1, 7, 30, 64]


@pytest.fixture(scope="module")
def asked(pg):
    """(picture, prompt, budget) of mixed tasks, and the answers of the library."""
    pictures = [SCENE, *map(picture, range(3))]
    rows = [(pictures[i % 4], PROMPTS[i % 6], BUDGETS[i // 2 % 4]) for i in range(32)]
    answers = [pg.generate(image, prompt, budget, constrained=True) for image, prompt, budget in rows]
    return rows, answers


@pytest.mark.parametrize("concurrency", [1, 8, 32])
def test_answers_over_http_are_those_of_the_library(client, asked, concurrency):
    rows, answers = asked
    rows, answers = rows[: max(8, concurrency)], answers[: max(8, concurrency)]

    def ask(row):
        image, prompt, budget = row
        body = {"image": data_url(image), "prompt": prompt, "max_tokens": budget, "masks": "rle"}
        reply = client.post("/v1/answer", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    with ThreadPoolExecutor(concurrency) as pool:
        replies = list(pool.map(ask, rows))
    for reply, answer in zip(replies, answers):
        assert reply["text"] == answer.text and reply["finished"] == answer.finished
        assert reply["score"] == pytest.approx(answer.score, abs=1e-5)
        found = [*reply["detections"], *reply["segments"]]
        wanted = [*answer.detections, *answer.segments]
        assert [item["label"] for item in found] == [item.label for item in wanted]
        assert [item["score"] for item in found] == pytest.approx([item.score for item in wanted], abs=1e-5)
