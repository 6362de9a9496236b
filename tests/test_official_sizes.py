"""The published sizes. The shapes of all of them are checked on the meta device, in the default run. Behind the
marker `official` two of them are written with random weights (6 GB of disk), loaded and made to answer, a third runs
from its file, the largest is written anew in 4 bits (15 GB of disk), and the memory that takes is measured:

    pytest tests/test_official_sizes.py -m official -s
"""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from paligemma.modeling_gemma import PaliGemmaConfig
from paligemma.weights.expected import expected_shapes
from paligemma.weights.published import published_config
from paligemma.weights.quantized import open_quantized
from paligemma.weights.saving import write_config
from paligemma.weights.writing import write_safetensors

# Parameters and bytes at 224 pixels, as published (PaliGemma 1 in float32, PaliGemma 2 in bfloat16).
PARAMETERS = {
    "paligemma-3b": (2_923_466_480, 11_693_865_920, torch.float32),
    "paligemma2-3b": (3_032_242_416, 6_064_484_832, torch.bfloat16),
    "paligemma2-10b": (9_662_638_832, 19_325_277_664, torch.bfloat16),
    "paligemma2-28b": (27_650_487_024, 55_300_974_048, torch.bfloat16),
}
MORE_AT = {224: 0, 448: 884_736, 896: 4_423_680}  # rows of the table of positions


def layout_h(config: PaliGemmaConfig) -> set[str]:
    """The keys of the files on the hub, written out."""
    eye, names = "vision_tower.vision_model.", set()

    def add(prefix, modules, kinds=("weight", "bias")):
        names.update(f"{prefix}{module}.{kind}" for module in modules for kind in kinds)

    add(eye, ["embeddings.patch_embedding", "post_layernorm"])
    add(eye, ["embeddings.position_embedding"], ["weight"])
    for i in range(config.vision_config.num_hidden_layers):
        add(f"{eye}encoder.layers.{i}.", ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"])
        add(f"{eye}encoder.layers.{i}.self_attn.", ["q_proj", "k_proj", "v_proj", "out_proj"])
    add("multi_modal_projector.", ["linear"])
    add("language_model.model.", ["embed_tokens", "norm"], ["weight"])
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.text_config.model_type == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for i in range(config.text_config.num_hidden_layers):
        layer = f"language_model.model.layers.{i}."
        add(layer, [*norms, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], ["weight"])
        add(layer + "self_attn.", ["q_proj", "k_proj", "v_proj", "o_proj"], ["weight"])
    return names


@pytest.mark.parametrize("image_size", MORE_AT)
@pytest.mark.parametrize("name", PARAMETERS)
def test_every_published_size_has_its_parameters_and_keys(name, image_size):
    parameters, size, dtype = PARAMETERS[name]
    config = published_config(name, image_size)
    shapes = expected_shapes(config)
    assert sum(map(math.prod, shapes.values())) == parameters + MORE_AT[image_size]
    assert size == parameters * dtype.itemsize
    assert set(shapes) == layout_h(config)
    text = config.text_config
    # Where the width of the heads is not that of the model, the two sides of these matrices must not be mixed up.
    assert shapes["language_model.model.layers.0.self_attn.q_proj.weight"] == (
        text.num_attention_heads * text.head_dim,
        text.hidden_size,
    )
    assert shapes["language_model.model.layers.0.self_attn.o_proj.weight"] == (
        text.hidden_size,
        text.num_attention_heads * text.head_dim,
    )


def write_random(config: PaliGemmaConfig, folder: Path) -> int:
    """A checkpoint in bfloat16 in shards of 5 GB, filled from one block of random numbers. Returns its bytes."""
    shapes = expected_shapes(config)
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).bfloat16()

    def read(name: str) -> torch.Tensor:
        shape = shapes[name]
        count = math.prod(shape)
        flat = noise.repeat(-(-count // len(noise)))[:count] if count > len(noise) else noise[:count]
        # So that what comes out of every matrix is about as large as what goes in.
        return (flat * (0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5)).view(shape)

    folder.mkdir()
    write_config(folder, config, torch.bfloat16)
    write_safetensors(folder, list(shapes), {n: (s, torch.bfloat16) for n, s in shapes.items()}, read, 5 * 10**9)
    return sum(2 * math.prod(shape) for shape in shapes.values())


# Runs in a process of its own. VmHWM is the most memory it ever held, maps of files that were touched included.
ANSWER = """
import json, sys, time
import torch

def most():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

facts = {"torch": most()}
import paligemma
from paligemma.weights.loading import load_model

start = time.time()
model = load_model(sys.argv[1])
facts["loaded"], facts["seconds to load"] = most(), time.time() - start
config = model.config
image = config.image_token_index
ids = torch.tensor([[image] * config.vision_config.num_patches + [2, 21209, 659, 108]])  # <image>... <bos>caption en
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
size = config.vision_config.image_size
with torch.inference_mode():
    start = time.time()
    inputs["image_features"] = model.encode_image(torch.rand(1, 3, size, size) * 2 - 1)
    facts["seconds to see"] = time.time() - start
start = time.time()
(answer,) = paligemma.generate(model, inputs, max_new_tokens=4, suppress_tokens=[1])
facts["seconds to answer"] = time.time() - start
facts["answered"], facts["tokens"] = most(), answer.token_ids
facts["logprobs"] = answer.token_logprobs
facts["dtype"] = str(model.dtype)
print(json.dumps(facts))
"""


@pytest.mark.official
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(("name", "image_size"), [("paligemma-3b", 224), ("paligemma2-3b", 448)])
def test_an_official_size_answers_within_its_own_memory(name, image_size, tmp_path):
    folder = tmp_path / name
    try:
        weights = write_random(published_config(name, image_size), folder)
        assert len(list(folder.glob("*.safetensors"))) == 2
        result = subprocess.run([sys.executable, "-c", ANSWER, str(folder)], capture_output=True, text=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    facts["times the weights"] = (facts["answered"] - facts["torch"]) / weights
    print(f"\n{name}-{image_size}: {json.dumps(facts, indent=2)}")
    assert facts["dtype"] == "torch.bfloat16"
    assert len(facts["tokens"]) == 4 and all(0 <= token < 257152 for token in facts["tokens"])
    assert all(math.isfinite(logprob) for logprob in facts["logprobs"])
    assert facts["times the weights"] <= 1.1


# ---------------------------------------------------------------------------------------------- larger than memory


def write_sparse(config: PaliGemmaConfig, folder: Path) -> int:
    """A checkpoint in bfloat16 that is all zeros and takes no disk: a header, and a hole. Returns its bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in expected_shapes(config).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    folder.mkdir()
    write_config(folder, config, torch.bfloat16)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


# In a process of its own. RssAnon is memory that is no page of a file: what would not come back by reading it again.
ONE_TOKEN = """
import json, sys, time
import torch

def own():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

facts = {"torch": own()}
import paligemma
from paligemma.weights.loading import load_model

start = time.time()
model = load_model(sys.argv[1])
facts["loaded"], facts["seconds to load"] = own(), time.time() - start
config = model.config
ids = torch.tensor([[config.image_token_index] * config.vision_config.num_patches + [2, 21209, 659, 108]])
size = config.vision_config.image_size
start = time.time()
(answer,) = paligemma.generate(
    model, {"input_ids": ids, "pixel_values": torch.zeros(1, 3, size, size)}, max_new_tokens=1, suppress_tokens=[1]
)
facts["answered"], facts["seconds to answer"] = own(), time.time() - start
facts["dtype"], facts["tokens"] = str(model.dtype), answer.token_ids
print(json.dumps(facts))
"""


@pytest.mark.official
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_checkpoint_nearly_as_large_as_the_machine_runs_from_its_file(tmp_path):
    """19.3 GB, of which nothing is copied: whatever does not fit is read from the file again."""
    folder = tmp_path / "paligemma2-10b"
    weights = write_sparse(published_config("paligemma2-10b", 224), folder)
    assert weights == PARAMETERS["paligemma2-10b"][1]
    result = subprocess.run([sys.executable, "-c", ONE_TOKEN, str(folder)], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    print(f"\npaligemma2-10b: {json.dumps(facts, indent=2)}")
    assert facts["dtype"] == "torch.bfloat16" and len(facts["tokens"]) == 1
    assert facts["loaded"] - facts["torch"] < 0.2e9
    assert facts["answered"] - facts["torch"] < 0.1 * weights  # activations, and the workspace of the products


@pytest.mark.official
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_checkpoint_twice_as_large_as_the_machine_is_quantised(tmp_path):
    """55.3 GB, of which no more than one matrix is held: as it was, and as it becomes."""
    config = published_config("paligemma2-28b", 224)
    write_sparse(config, tmp_path / "whole")
    command = [
        sys.executable,
        "-m",
        "paligemma",
        "quantize",
        str(tmp_path / "whole"),
        str(tmp_path / "small"),
        "--int4",
    ]
    most, start = 0, time.time()
    with (tmp_path / "errors").open("w+") as errors:
        process = subprocess.Popen(command, stderr=errors)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            own = next((line for line in status if line.startswith("RssAnon")), "RssAnon: 0 kB")
            most = max(most, int(own.split()[1]) * 1024)
            time.sleep(0.05)
        errors.seek(0)
        assert process.returncode == 0, errors.read()
    files = list((tmp_path / "small").glob("*.safetensors"))
    size, seconds = sum(file.stat().st_size for file in files), time.time() - start
    print(f"\npaligemma2-28b in 4 bits: {size / 1e9:.2f} GB, {seconds:.0f} s, {most / 1e9:.2f} GB of its own memory")
    assert open_quantized(tmp_path / "small").mode == "int4"
    assert 0.5 * PARAMETERS["paligemma2-28b"][0] < size < 0.6 * PARAMETERS["paligemma2-28b"][0]
    largest = max(map(math.prod, expected_shapes(config).values()))
    assert most < 0.5e9 + 3 * largest  # Python and PyTorch; two bytes as it was, one as it becomes
    shutil.rmtree(tmp_path / "small")
