"""Tiny models of random weights, in memory and on disk."""

import pytest
from checkpoint_files import make_model

from paligemma.weights.saving import save_pretrained


@pytest.fixture(params=["gemma", "gemma2"])
def model(request):
    return make_model(request.param)


@pytest.fixture
def gemma():
    return make_model("gemma")


@pytest.fixture
def folder(gemma, tmp_path):
    """A saved checkpoint in one file."""
    save_pretrained(gemma, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def sharded(gemma, tmp_path):
    save_pretrained(gemma, tmp_path / "sharded", max_shard_size=100_000)
    return tmp_path / "sharded"
