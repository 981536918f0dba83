"""Fixtures that all tests share. Nothing of the program is imported before a test asks for it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products in full: training lets a CPU with AMX round their factors to bfloat16."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def one_thread():
    """One thread: tensors this small gain nothing from more, and lose where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    """The small model of small.py, paradigm flow, every weight random."""
    from small import small

    return small()
