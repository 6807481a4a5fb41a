"""Without a GPU, Triton kernels run in Triton's interpreter; it must know before its import."""

import os

import pytest

from .browser import browser, page, watched  # noqa: F401 - fixtures

if "PYTEST_XDIST_WORKER" in os.environ:  # workers' threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device():
    """Where Triton kernels can run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
