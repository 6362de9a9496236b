"""`generate(..., compile=True)`: the same answers, one graph, one host read a step."""

import functools
import math

import pytest
import torch
from reference import make_inputs, randomize, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import paligemma
from paligemma import compiled
from paligemma.cli.main import app
from paligemma.engine import generate, stream
from paligemma.generation import decode_one_token
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration

FAMILIES = {"gemma": {"num_key_value_heads": 1}, "gemma2": {"sliding_window": 4}}


@pytest.fixture(params=FAMILIES)
def model(request):
    model = PaliGemmaForConditionalGeneration(tiny_config(request.param, **FAMILIES[request.param])).eval()
    randomize(model)
    return model


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that is compiled; they run as they are, which takes no compiler."""
    torch._dynamo.reset()
    found = []

    def backend(graph, _):
        found.append(graph)
        return graph

    step = torch.compile(decode_one_token, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(compiled, "compiled_step", lambda device_type: step)
    return found


@pytest.mark.parametrize("prefix", [[5], [5, 2, 7]], ids=["one row", "three rows"])
def test_answers_are_the_same_and_one_graph_gives_them(model, graphs, prefix):
    for number, seed in enumerate((0, 1)):
        inputs = make_inputs(model.config, prefix, seed=seed)
        expected = generate(model, inputs, max_new_tokens=12)
        found = generate(model, inputs, max_new_tokens=12, compile=True)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        assert [one.finished for one in found] == [one.finished for one in expected]
        for one, other in zip(found, expected):
            assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-5)
        assert len(graphs) == 1, number  # the second call finds cache and graph of the first


def test_rows_that_end_early_are_left_alone(model, graphs):
    inputs = make_inputs(model.config, [5, 2, 7])
    eos = generate(model, inputs, max_new_tokens=12)[1].token_ids[2]
    expected = generate(model, inputs, max_new_tokens=12, eos_token_id=eos)
    found = generate(model, inputs, max_new_tokens=12, eos_token_id=eos, compile=True)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.finished for one in found] == [one.finished for one in expected] and found[1].finished


def test_sampling_and_constraints(model, graphs):
    inputs = make_inputs(model.config, [5, 2])
    sampled = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "seed": [3, 4]}
    expected = generate(model, inputs, **sampled)
    found = generate(model, inputs, **sampled, compile=True)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]

    def even(generated, remaining):
        return torch.arange(10, 100, 2) if remaining > 1 else torch.tensor([1])

    constrained = {"max_new_tokens": 6, "constraint": [even, None], "watch": (10, 50)}
    expected = generate(model, inputs, **constrained)
    found = generate(model, inputs, **constrained, compile=True)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert all(token % 2 == 0 for token in found[0].token_ids)
    assert [one.finished for one in found] == [one.finished for one in expected]

    def nothing(generated, remaining):
        return torch.tensor([300])  # <image>, which is never produced

    for sampling in ({}, {"do_sample": True, "top_k": 5, "top_p": 0.9}):
        with pytest.raises(ValueError, match="a constraint allows nothing that may be produced"):
            generate(model, inputs, constraint=nothing, compile=True, **sampling)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_an_error(model, monkeypatch, do_sample, value):
    """The one that `generate` gives without `compile`, also under a constraint; and before anything is sampled."""
    monkeypatch.setattr(compiled, "decode_compiled", lambda *_: torch.full((2, 320), value))
    inputs = make_inputs(model.config, [5, 2])
    options = {"do_sample": do_sample, "seed": 0, "eos_token_id": 301, "compile": True}  # 301 is never produced
    for constraint in (None, [None, lambda generated, remaining: torch.arange(10, 100)]):
        with pytest.raises(FloatingPointError, match=r"not finite numbers in torch\.float32"):
            generate(model, inputs, constraint=constraint, **options)


class HostReads(TorchDispatchMode):
    """Counts copies to the host, of a number or of a list of them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_host_reads_once_in_a_step(model, monkeypatch, do_sample):
    """Everything that a step does beside its graph: each further token costs one more `tolist`, and no `item`."""
    lists = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self.shape) or tolist(self))
    monkeypatch.setattr(compiled, "compiled_step", lambda device_type: decode_one_token)
    inputs, counts = make_inputs(model.config, [5, 2]), []
    options = functools.partial(
        compiled.Options, suppress_tokens=[model.config.eos_token_id], do_sample=do_sample, seed=0, compile=True
    )
    for budget in (4, 9):
        lists.clear()
        with HostReads() as reads:
            compiled.generate_compiled(model, inputs, options(budget))
        counts.append((reads.count, len(lists)))
    (reads_4, lists_4), (reads_9, lists_9) = counts
    assert (reads_9 - reads_4, lists_9 - lists_4) == (0, 5)


@torch.no_grad()
def test_a_cache_is_used_again_where_it_fits(model):
    cache = compiled._cache_for(model, 1, 20)
    compiled._caches[model] = cache
    assert compiled._cache_for(model, 1, 25) is cache
    for change in (lambda: model.double(), lambda: model.to("meta")):
        compiled._caches[model] = cache
        change()
        cache = compiled._cache_for(model, 1, 20)
        assert (cache.keys[0].dtype, cache.keys[0].device) == (model.dtype, model.device)


def test_what_cannot_be_compiled_is_told(model):
    inputs = make_inputs(model.config, [5])
    with pytest.raises(ValueError, match="beams are not compiled"):
        generate(model, inputs, num_beams=2, compile=True)
    with pytest.raises(ValueError, match="streaming with compile=True is not offered"):
        stream(model, inputs, range(320), compile=True)
    paligemma.quantize(model, "int8")
    with pytest.raises(ValueError, match=r"has layers that cannot be compiled \(.*\): load it without `quantize`"):
        generate(model, inputs, compile=True)
    done = CliRunner().invoke(app, ["run", "caption en", "examples/scene.png", "--compile", "--quantize", "int8"])
    assert done.exit_code == 2 and "--compile goes neither with --beams nor with --quantize" in done.stderr


def test_a_published_size_on_a_cpu_is_told_which_dtype_can_be_compiled(monkeypatch):
    """It has layers of our own though nobody asked for `quantize`."""
    monkeypatch.setattr("paligemma.utils.published_name", lambda config: "an official one")
    with pytest.raises(ValueError, match="get such layers in bfloat16 without it: choose dtype float32"):
        compiled.check_can_be_compiled(paligemma.load("tiny", device="cpu", dtype="bfloat16").model)
    compiled.check_can_be_compiled(paligemma.load("tiny", device="cpu", dtype="float32").model)


@pytest.mark.slow
def test_the_embedded_model_compiled_by_inductor():
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    torch._dynamo.reset()
    prompts = ["caption en", "detect book", "answer en what is this ?"]
    expected = pg.generate("examples/scene.png", prompts)
    found = pg.generate("examples/scene.png", prompts, compile=True)
    assert [one.text for one in found] == [one.text for one in expected]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_recorded_graph_gives_the_eager_answers(model, dtype):
    """Two calls: the second one replays the graph of the first, over the same cache."""
    torch._dynamo.reset()
    model = model.to("cuda", dtype)
    for seed in (0, 1):
        inputs = make_inputs(model.config, [5, 2, 7], seed=seed)
        expected = generate(model, inputs, max_new_tokens=12)
        found = generate(model, inputs, max_new_tokens=12, compile=True)
        if dtype == torch.float32:
            assert [one.token_ids for one in found] == [one.token_ids for one in expected]
        for one, other in zip(found, expected):  # in bfloat16 as long as both chose the same tokens
            same = next((n for n, pair in enumerate(zip(one.token_ids, other.token_ids)) if len(set(pair)) > 1), 12)
            bound = 1e-4 if dtype == torch.float32 else 0.2
            assert one.token_logprobs[:same] == pytest.approx(other.token_logprobs[:same], abs=bound)
