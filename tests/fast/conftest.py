"""Fixtures of this room: each way to compute the same."""

import pytest
import torch
from ways import BOTH, use


@pytest.fixture(params=BOTH)
def kernels(request, monkeypatch):
    """The kernels of either file. A CPU with AVX-512 has AVX2 as well."""
    use(request.param, monkeypatch.setattr)
    return request.param


@pytest.fixture(params=[*BOTH, "plain"])
def way(request, monkeypatch):
    """All ways to compute the same."""
    use(request.param, monkeypatch.setattr)
    return request.param


@pytest.fixture
def without_gradients():
    """The kernels compute none."""
    with torch.no_grad():
        yield
