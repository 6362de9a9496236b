"""Shared by every test file: one thread-count, one seed, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # the models of the tests are so small that threads would only wait for each other


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
