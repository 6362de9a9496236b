"""`/v1/chat/completions`: the replies, and what is taken and refused."""

import json

import openai
import pytest
from serving import SCENE, chat, data_url, error_of, picture, running

URL = "/v1/chat/completions"


def events(response):
    """The JSON of each event of a stream; the last line must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_boxes_come_with_the_text(client, pg):
    reply = client.post(URL, json=chat("detect book ; house")).json()
    (choice,) = reply["choices"]
    about = choice["message"]["paligemma"]
    expected = pg.generate(SCENE, "detect book ; house", 512, constrained=True)
    assert choice["message"]["content"] == expected.text
    assert set(about) == {"image_size", "score", "finished", "invalid", "segments", "detections"}
    assert about["image_size"] == [384, 384] and about["finished"] and choice["finish_reason"] == "stop"
    for found, wanted in zip(about["detections"], expected.detections, strict=True):
        assert set(found) == {"label", "box", "score"} and found["label"] == wanted.label
        assert found["box"] == list(wanted.box) and found["score"] == pytest.approx(wanted.score, abs=1e-5)
    assert reply["object"] == "chat.completion" and reply["id"].startswith("chatcmpl-") and reply["model"] == "tiny"
    # The patches, bos, the prompt and its newline; the answer and eos.
    asked, written = pg.processor.num_image_tokens + 6, len(expected.token_ids) + 1
    assert reply["usage"] == {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def test_the_budget_ends_an_answer_with_length(client, pg):
    reply = client.post(URL, json=chat(max_tokens=3)).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["choices"][0]["message"]["content"] == pg.generate(SCENE, "caption en", 3).text
    assert reply["usage"]["completion_tokens"] == 3
    assert client.post(URL, json=chat(max_completion_tokens=3)).json()["usage"]["completion_tokens"] == 3


def test_a_stream_is_the_answer_in_pieces(client):
    whole = client.post(URL, json=chat(logprobs=True)).json()["choices"][0]
    chunks = events(client.post(URL, json=chat(stream=True, stream_options={"include_usage": True}, logprobs=True)))
    *chunks, last, usage = chunks
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta["content"] for delta in deltas) == whole["message"]["content"] and len(deltas) > 5
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["delta"] == {"paligemma": whole["message"]["paligemma"]}
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 5
    logs = [chunk["choices"][0]["logprobs"] for chunk in [*chunks, last]]
    tokens = [token for one in logs if one for token in one["content"]]
    assert [token["token"] for token in tokens] == [token["token"] for token in whole["logprobs"]["content"]]
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}


def test_a_stream_without_usage_does_not_mention_it(client):
    chunks = events(client.post(URL, json=chat(stream=True)))
    assert all("usage" not in chunk for chunk in chunks)


def test_log_probabilities_are_those_of_the_tokens(client, pg):
    content = client.post(URL, json=chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    answer = pg.generate(SCENE, "caption en")
    assert [token["logprob"] for token in content] == pytest.approx(answer.token_logprobs, abs=1e-5)
    assert bytes(byte for token in content for byte in token["bytes"]).decode().split() == answer.text.split()


def test_json_object_makes_the_content_the_items(client):
    plain = client.post(URL, json=chat("segment house")).json()["choices"][0]["message"]
    body = chat("segment house", response_format={"type": "json_object"})
    items = json.loads(client.post(URL, json=body).json()["choices"][0]["message"]["content"])
    assert items == {"detections": [], "segments": plain["paligemma"]["segments"]} and items["segments"]
    *_, last = events(client.post(URL, json={**body, "stream": True}))
    assert json.loads(last["choices"][0]["delta"]["content"]) == items
    assert error_of(client.post(URL, json=chat(response_format={"type": "json_object"})))[2] == "response_format"


def test_a_choice_is_one_of_the_choices(client, pg):
    question, choices = "answer en how many dogs are there?", ["seven", "nine"]
    body = chat(question, structured_outputs={"choice": choices})
    content = client.post(URL, json=body).json()["choices"][0]["message"]["content"]
    assert content == pg.ask(SCENE, "how many dogs are there?", choices=choices).text
    assert error_of(client.post(URL, json=chat(structured_outputs={"choice": []})))[2] == "structured_outputs.choice"
    empty = client.post(URL, json=chat(structured_outputs={"choice": ["yes", ""]}))
    assert error_of(empty)[2] == "structured_outputs.choice[1]" and "choices" not in empty.text
    assert error_of(client.post(URL, json=chat(structured_outputs={"json": {}})))[1] == "unknown_field"


def test_free_decoding_on_request(client, pg):
    reply = client.post(URL, json=chat("detect book", constrained=False)).json()
    assert reply["choices"][0]["message"]["content"] == pg.generate(SCENE, "detect book", 512).text


def test_sampling_is_repeatable_with_a_seed(client, pg):
    def asked(**fields):
        return client.post(URL, json=chat(**fields)).json()["choices"][0]["message"]["content"]

    same = [asked(temperature=3, seed=7, max_tokens=8) for _ in range(2)]
    answer = pg.generate(SCENE, "caption en", 8, do_sample=True, temperature=3, seed=7)
    assert same[0] == same[1] == answer.text
    assert asked(temperature=0, top_p=0.5, top_k=-1, seed=1) == asked()  # greedy


def test_several_pictures_are_one_row(client, pg):
    body = chat("caption en")
    other = picture(1)
    body["messages"][0]["content"].insert(1, {"type": "image_url", "image_url": {"url": data_url(other)}})
    content = client.post(URL, json=body).json()["choices"][0]["message"]["content"]
    assert content == pg.generate((SCENE, other), "caption en").text


NEUTRAL = {
    "n": 1, "stop": None, "logit_bias": {}, "tools": [], "metadata": {}, "presence_penalty": 0.0,
    "frequency_penalty": 0, "user": "me", "tool_choice": "none", "store": False, "top_logprobs": 0,
    "parallel_tool_calls": True, "response_format": {"type": "text"}, "temperature": None, "seed": None,
}  # fmt: skip


def test_neutral_values_are_taken(client):
    body = chat(max_tokens=2)
    body["messages"][0]["name"] = "me"
    body["messages"][0]["content"][0]["image_url"]["detail"] = "high"
    assert client.post(URL, json={**body, **NEUTRAL}).status_code == 200


@pytest.mark.parametrize(
    "fields, code, param",
    [
        ({"n": 2}, "invalid_value", "n"),
        ({"n": True}, "invalid_value", "n"),
        ({"stop": ["x"]}, "invalid_value", "stop"),
        ({"presence_penalty": 0.5}, "invalid_value", "presence_penalty"),
        ({"tools": [{}]}, "invalid_value", "tools"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**9}, "invalid_value", "max_tokens"),
        ({"max_tokens": True}, "invalid_value", "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "invalid_value", "max_tokens"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_k": 1.5}, "invalid_value", "top_k"),
        ({"seed": -1}, "invalid_value", "seed"),
        ({"stream": "yes"}, "invalid_value", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"what": 1}}, "unknown_field", "stream_options.what"),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.type"),
        ({"guided_choice": ["a"]}, "unknown_field", "guided_choice"),
        ({"structured_outputs": {"choice": ["a" * 100_001]}}, "invalid_value", "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"] * 1_001}}, "invalid_value", "structured_outputs.choice"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": None}, "invalid_value", "messages"),
        ({"messages": ["hello"]}, "invalid_value", "messages[0]"),
        ({"messages": [{"role": "user", "content": 7}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": "caption en"}]}, "no_image", "messages"),
        ({"messages": [{"role": "system", "content": "be kind"}]}, "unsupported_messages", "messages[0].role"),
        ({"messages": [{"role": "user", "content": "hi", "x": []}]}, "unknown_field", "messages[0].x"),
        ({"messages": [{"role": "user", "content": "hi"}] * 10_000}, "unsupported_messages", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "invalid_value", "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "half \ud83d"}]}]},
            "invalid_value", "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}]},
            "invalid_value", "messages[0].content[0].image_url.url",
        ),
    ],
)  # fmt: skip
def test_whatever_is_not_offered_is_refused_by_name(client, fields, code, param):
    content = json.dumps({**chat(), **fields})  # as escapes: what half a character is in JSON
    reply = client.post(URL, content=content, headers={"content-type": "application/json"})
    assert error_of(reply) == (400, code, param)


@pytest.mark.parametrize(
    "prompt, code",
    [
        ("what is <image> here", "invalid_prompt"),
        ("detect ", "invalid_prompt"),
        ("detect dog ; ; cat", "invalid_prompt"),
        ("detect <loc0001>", "invalid_prompt"),
        ("caption en " * 2_000, "prompt_too_long"),
        ("x" * 10**6, "prompt_too_long"),
    ],
)
def test_prompts_that_cannot_be_answered(client, prompt, code):
    assert error_of(client.post(URL, json=chat(prompt))) == (400, code, "messages")


def test_too_many_pictures(client):
    body = chat()
    body["messages"][0]["content"] *= 5
    assert error_of(client.post(URL, json=body)) == (400, "too_many_images", "messages")


def test_another_model_is_not_found(client):
    assert error_of(client.post(URL, json={**chat(), "model": "gpt-4o"})) == (404, "model_not_found", "model")
    body = chat(max_tokens=2)
    del body["model"]
    assert client.post(URL, json=body).status_code == 200


def test_history_is_ignored_where_the_server_is_set_to_it(pg):
    body = chat(max_tokens=2)
    body["messages"] = [{"role": "system", "content": "be kind"}, {"role": "what"}, *body["messages"]]
    with running(pg, ignore_history=True) as server, server.client() as client:
        reply = client.post(URL, json=body).json()
        assert reply["choices"][0]["message"]["paligemma"]["ignored"] == ["messages[0]", "messages[1]"]


# ------------------------------------------------------------------------------------------------ openai's own client


@pytest.fixture
def openai_client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openai_client(openai_client):
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    assert openai_client.models.retrieve("tiny").id == "tiny"
    plain = openai_client.chat.completions.create(**chat("detect book"))
    assert plain.choices[0].message.content.endswith("book") and plain.usage.total_tokens > 70
    assert plain.choices[0].message.paligemma["detections"][0]["label"] == "book"
    chunks = list(
        openai_client.chat.completions.create(
            **chat("detect book", stream=True, stream_options={"include_usage": True})
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content and chunks[-1].usage == plain.usage
    with pytest.raises(openai.BadRequestError, match="max_tokens is 0, expected a whole number from 1 to 512") as error:
        openai_client.chat.completions.create(**chat(max_tokens=0))
    assert error.value.param == "max_tokens" and error.value.code == "invalid_value"
