"""Initialisation by structured sketching (docs/method.md, Initialisation)."""

import torch
from torch import Tensor

from ..machine.arithmetic import solve

RESIDUAL = 1e-6  # |r|^2 / |w|^2 below which a group needs no further basis


def sketch(w: Tensor, I: int) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy multi-bit approximation of every group at once.

        r = w;  k = 0
        while k < min(I, n) and |r|^2 / |w|^2 >= 1e-6:
            B[k] = sign(r);  k += 1                        sign(0) = +1
            alpha[:k] = argmin_a |w - B[:k]^T a|^2
            r = w - B[:k]^T alpha[:k]
        flip negative coordinates with their bases; drop zeros; order the rest ascending

    The normal equations (B B^T) a = B w grow by one row a turn, so a turn costs k products of
    length n; they are solved in float64. A group that is done, or is all zeros, gets no more bases.

    Arguments: w (G, n); I, the largest bitwidth.
    Returns: B (G, I, n) int8 with dead rows 0, alpha (G, I), mask (G, I) bool; dead ones last.
    """
    G, n = w.shape
    dtype = torch.float32 if w.device.type == "mps" else torch.float64  # mps has no float64
    exact: dict = {"dtype": dtype, "device": w.device}
    B = torch.zeros(G, I, n, dtype=torch.int8, device=w.device)
    mask = torch.zeros(G, I, dtype=torch.bool, device=w.device)
    gram = torch.eye(I, **exact).repeat(G, 1, 1)  # (G, I, I): B B^T, identity where no basis is
    Bw = torch.zeros(G, I, **exact)
    alpha = torch.zeros(G, I, **exact)
    size = w.to(dtype).square().sum(1)  # (G,)
    r = w
    for k in range(min(I, n)):
        # I2, I3  groups whose residual is large enough get the basis sign(r)
        going = (r.to(dtype).square().sum(1) >= RESIDUAL * size) & (size > 0)  # (G,)
        basis = torch.where(r < 0, -1, 1).to(w.dtype) * going.unsqueeze(1)  # (G, n)
        B[:, k] = basis.to(torch.int8)
        mask[:, k] = going
        # I4  alpha[:k+1] = argmin |w - B^T a|^2
        row = (B[:, : k + 1].to(w.dtype) @ basis.unsqueeze(2)).squeeze(2).to(dtype)  # (G, k+1)
        row[:, k] += ~going
        gram[:, k, : k + 1] = row
        gram[:, : k + 1, k] = row
        Bw[:, k] = (basis * w).sum(1, dtype=dtype)
        system = gram[:, : k + 1, : k + 1]
        alpha[:, : k + 1] = solve(system, Bw[:, : k + 1])
        # I5  r = w - B^T alpha
        r = w - (alpha[:, : k + 1].to(w.dtype).unsqueeze(1) @ B[:, : k + 1].to(w.dtype)).squeeze(1)

    # I6  flip negative coordinates with their bases
    B = B * torch.where(alpha < 0, -1, 1).to(torch.int8).unsqueeze(2)
    alpha = alpha.abs().to(w.dtype)
    # I7  drop zeros; order the rest ascending, dead ones last
    mask &= alpha != 0
    order = torch.where(mask, alpha, torch.inf).sort(dim=1, stable=True).indices  # (G, I)
    mask = mask.gather(1, order)
    alpha = alpha.gather(1, order) * mask
    B = B.gather(1, order.unsqueeze(2).expand_as(B)) * mask.unsqueeze(2)
    return B, alpha, mask
