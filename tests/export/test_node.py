"""transformers.js opens what was exported and gives PyTorch's tokens, on the pixels that it makes itself.

Its resizing differs from PIL's at edges, so boxes may move by a bin or two from what `paligemma run` says. What is
compared is the model: both get the pixels of transformers.js.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import paligemma

pytest.importorskip("onnx_ir", reason="needs the extra `export`")

from paligemma.export.exporting import export

ROOT = Path(__file__).parents[2]
MODULES = ROOT / ".cache" / "node"  # installed once
VERSION = "4.3.2"
PROMPTS = ["caption en", "answer en how many objects are there ?", "detect book ; house"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("node") is None or shutil.which("npm") is None, reason="needs Node.js and npm"),
]


@pytest.fixture(scope="module")
def modules() -> Path:
    """The folder with node_modules; skipped where npm cannot install it."""
    if not (MODULES / "node_modules" / "@huggingface" / "transformers").is_dir():
        MODULES.mkdir(parents=True, exist_ok=True)
        skip = {"ONNXRUNTIME_NODE_INSTALL": "skip", "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
        command = ["npm", "install", "--no-audit", "--no-fund", f"@huggingface/transformers@{VERSION}"]
        command += ["--cache", str(MODULES / "npm")]
        done = subprocess.run(command, cwd=MODULES, env={**os.environ, **skip}, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm cannot install transformers.js: {done.stderr[-300:]}")
    return MODULES


@torch.inference_mode()
def test_transformers_js_gives_the_same_tokens(modules, tmp_path):
    folder, picture = tmp_path / "exported", ROOT / "examples" / "scene.png"
    export("tiny", folder, ["fp32", "q8"])
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    for dtype in ("fp32", "q8"):
        command = ["node", str(ROOT / "tests/export/answer.mjs"), str(folder), dtype, str(picture), *PROMPTS]
        done = subprocess.run(command, cwd=modules, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        pixels = torch.tensor(said["pixels"]).view(said["shape"])
        own = pg.processor(text=[""], images=[picture])["pixel_values"]
        print(
            f"\nmean difference of pixels: {(pixels - own).abs().mean():.4f}, largest {(pixels - own).abs().max():.4f}"
        )
        assert (pixels - own).abs().mean() < 0.05
        for prompt, answered in zip(PROMPTS, said["answers"]):
            inputs = pg.processor(text=[prompt], images=[picture])
            assert inputs["input_ids"].tolist() == [answered["prompt"]]
            inputs["pixel_values"] = pixels
            (expected,) = paligemma.generate(pg.model, inputs, max_new_tokens=40)
            answer = [token for token in answered["answer"] if token != pg.model.config.eos_token_id]
            if dtype == "fp32":
                assert answer == expected.token_ids, prompt
            else:  # rounded: the same words, and boxes within a few bins
                differing = sum(one != other for one, other in zip(answer, expected.token_ids))
                assert len(answer) == len(expected.token_ids) and differing <= 4, prompt
