"""Fixtures of the kernels' tests."""

import pytest
import torch


@pytest.fixture
def poison():
    """Fresh memory is NaN, so an element that nothing writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
