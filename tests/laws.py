"""What the tests of assignments/ share: comparisons that say which law is broken.

# B batch, T tokens or words, D width
"""

import torch
from torch import Tensor


def assert_shape(actual, shape: tuple, law: str) -> None:
    """law: what the function returns, in words."""
    assert isinstance(actual, Tensor), f"{law}: a tensor {shape}, not {type(actual).__name__}"
    assert tuple(actual.shape) == shape, f"{law}: of shape {shape}, not {tuple(actual.shape)}"


def assert_close(actual, expected: Tensor, law: str, atol: float = 1e-5) -> None:
    """Elementwise, with the law and the place where they differ most."""
    assert_shape(actual, tuple(expected.shape), law)
    assert actual.isfinite().all(), f"{law}: some values are not finite"
    difference = (actual.detach().double() - expected.detach().double()).abs()
    allowed = atol + 1e-4 * expected.detach().double().abs()
    if (difference > allowed).any():
        worst = (difference - allowed).argmax().item()
        got, wanted = actual.flatten()[worst].item(), expected.flatten()[worst].item()
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
        raise AssertionError(f"{law}: at {list(at)} it is {got:.5g} instead of {wanted:.5g}")


def assert_learns(parameter: Tensor, what: str) -> None:
    """A backward pass has reached the parameter."""
    assert parameter.grad is not None, f"no gradient reaches {what}: is something detached?"
    assert parameter.grad.abs().sum() > 0, f"the gradient of {what} is zero"


def assert_gradients_agree(actual, expected, law: str) -> None:
    """Pairs of {name: tensor}: the gradients of one computation done in two ways."""
    for name, tensor in expected.items():
        assert_learns(actual[name], name)
        assert_close(actual[name].grad, tensor.grad, f"the gradient of {name}: {law}", 1e-4)


def random_weights(module: torch.nn.Module, std: float = 0.3, seed: int = 0) -> None:
    """Every weight random: weights that start at zero would hide what flows through them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator))
