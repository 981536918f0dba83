"""What holds for all tests."""
import pytest
import torch


@pytest.fixture(autouse=True)
def exact_products():
    """Training lets a CPU with AMX round the factors of a product to bfloat16 (train.Policy), for all of a process: laws are checked without."""
    torch.set_float32_matmul_precision("highest")
