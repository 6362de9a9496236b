"""A small base model and its rows, for all tests of training runs."""

import pytest
from test_train import make_model, make_processor
from training_runs import write_data

from paligemma.weights.saving import save_pretrained


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """A checkpoint with random weights: 28 x 28 pixels, 4 image tokens."""
    folder = tmp_path_factory.mktemp("base")
    processor = make_processor(tmp_path_factory.mktemp("tokenizer"))
    save_pretrained(make_model(processor), folder, processor)
    return str(folder)


@pytest.fixture
def data(tmp_path) -> str:
    return write_data(tmp_path / "data")
