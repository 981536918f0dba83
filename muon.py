"""Muon (arXiv 2502.16982): SGD with momentum whose steps are orthogonal matrices.

torch.optim.Muon takes the matrices one by one. A transformer has many of few shapes: here those of
one shape are stacked, and each product of the iteration is a single batched one.

# M matrices of one shape
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of `orthogonalize`, from Muon's authors
ITERATIONS = 5
RMS = 0.2  # of a step's entries, times the learning rate: as AdamW's are (section 2.2, eq. 4)


class Muon(torch.optim.Optimizer):
    """Matrices alone; equal to torch.optim.Muon with match_rms_adamw and no weight decay."""

    def __init__(self, matrices, lr: float = 1e-3, momentum: float = 0.95):
        by_shape = {}
        for p in matrices:
            by_shape.setdefault(p.shape, []).append(p)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            if not matrices:
                continue
            # Nesterov's momentum: the mean of the gradients so far, then a look ahead
            for p in matrices:
                if not self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
            gradients = [p.grad for p in matrices]
            means = [self.state[p]["mean"] for p in matrices]
            torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
            directions = torch._foreach_lerp(gradients, means, group["momentum"])

            steps = orthogonalize(torch.stack(directions)).to(matrices[0].dtype)
            size = group["lr"] * RMS * max(matrices[0].shape) ** 0.5
            torch._foreach_add_(matrices, steps.unbind(), alpha=-size)


def orthogonalize(x):
    """Matrices (M, rows, columns), each with its singular values moved to about 1: bfloat16.

    Newton-Schulz iterations x <- a x + b (x x^T) x + c (x x^T)^2 x, after a division by the norm.
    """
    a, b, c = COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT.bfloat16() if is_tall else x.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x
