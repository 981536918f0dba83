"""muon.py: torch's Muon, but for how many products it takes."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from muon import Muon, orthogonalize

SHAPES = [(24, 24), (48, 24), (24, 48), (24, 24), (48, 24), (96, 24), (24, 24)]


def random_matrices():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


@pytest.mark.usefixtures("one_thread")
def test_each_step_is_that_of_torch():
    ours, theirs = random_matrices(), random_matrices()
    muon = Muon(ours)
    reference = torch.optim.Muon(theirs, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for optimizer in (muon, reference):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (1 + step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours[2].grad = theirs[2].grad = None  # a matrix that had no part in the loss
        before = theirs[2].clone()
        muon.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert torch.equal(ours[2], before)


def test_a_state_is_saved_and_loaded():
    first, second = random_matrices(), random_matrices()
    a, b = Muon(first), Muon(second)
    gradients = [torch.randn_like(p) for p in first]
    for p, gradient in zip(first, gradients, strict=True):
        p.grad = gradient
    a.step()
    b.load_state_dict(deepcopy(a.state_dict()))
    for p, q, gradient in zip(first, second, gradients, strict=True):
        q.data.copy_(p)
        q.grad = gradient.clone()
    a.step()
    b.step()
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("shape", [(3, 24, 48), (3, 48, 24), (1, 24, 24)])
def test_singular_values_become_about_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_the_products_are_as_many_as_the_shapes():
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
            return function(*args, **(kwargs or {}))

    matrices = random_matrices()
    for p in matrices:
        p.grad = torch.randn_like(p)
    muon = Muon(matrices)
    with Products() as products:
        muon.step()
    assert products.count == 3 * 5 * len(set(SHAPES))
