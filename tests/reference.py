"""The method in plain loops, one group at a time, float64: slow and obvious.

A `Reference` holds one layer as (G, n) and goes through the four steps as docs/method.md has them.
The fast code is stepped against it (tests/compare.py).

Where two levels are equally near, rounding decides between them, and a different but right answer
comes out. So a step can be shown what the code under test chose: it makes sure that this is as near
as anything else, and goes on from there.
"""

from __future__ import annotations

import itertools

import numpy as np

RIDGE = 1e-4  # as a share of the group's sum of h


def sketch_group(w: np.ndarray, I: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """One group -> its bases (k, n) and coordinates (k,), ascending; whether a sign was a tie.

    A tie is a residual of rounding size, whose sign is arbitrary.
    """
    bases: list[np.ndarray] = []
    alpha = np.zeros(0)
    r, tie = w.copy(), False
    while len(bases) < min(I, len(w)) and w @ w > 0 and (r @ r) / (w @ w) >= 1e-6:
        tie |= bool(bases) and np.abs(r).min() < 1e-12
        bases.append(np.where(r < 0, -1.0, 1.0))
        B = np.array(bases)
        alpha = np.linalg.lstsq(B.T, w, rcond=None)[0]
        r = w - B.T @ alpha
    pairs = [(abs(a), b if a >= 0 else -b) for a, b in zip(alpha, bases, strict=True) if a != 0]
    pairs.sort(key=lambda pair: pair[0])
    B = np.array([b for _, b in pairs]).reshape(-1, len(w))
    return B, np.array([a for a, _ in pairs]), tie


def sign_patterns(k: int) -> np.ndarray:
    """All (2^k, k) of -1 and +1."""
    return np.array(list(itertools.product((-1.0, 1.0), repeat=k))).reshape(2**k, k)


def codes(B: np.ndarray) -> np.ndarray:
    """Bases (k, n) -> (n,): the place of each weight's signs among the `sign_patterns`."""
    return (2 ** np.arange(len(B))[::-1, None] * (B > 0)).sum(0)


def distances(t: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Targets (n,), live coordinates (k,) -> (2^k, n): how far each level is, by brute force."""
    return np.abs((sign_patterns(len(alpha)) @ alpha)[:, None] - t)


class Reference:
    """One layer, stepped with gradients (G, n).

    `tie` is the difference in distance, relative to the layer's largest weight, below which two
    levels count as equally near. `tied` (G,) tells the groups where the last step met such a pair
    of levels with different signs.
    """

    def __init__(
        self, B, alpha, mask, lr, betas=(0.9, 0.999), eps=1e-8, wd=0.0, tie=1e-9,
        ridge=None,
    ) -> None:  # fmt: skip
        self.take_over(B, alpha, mask)
        self.lr, self.betas, self.eps, self.wd, self.tie = lr, betas, eps, wd, tie
        self.ridge = ridge
        G, I, n = self.B.shape
        self.t = self.t_a = 0
        self.m, self.v, self.v_max = (np.zeros((G, n)) for _ in range(3))
        self.m_a, self.v_a, self.v_a_max = (np.zeros((G, I)) for _ in range(3))
        self.w0 = None
        self.tied = np.zeros(G, bool)

    def take_over(self, B, alpha, mask) -> None:
        """Go on from another's state, whose bases are in the same order."""
        self.B, self.alpha = np.asarray(B, float).copy(), np.asarray(alpha, float).copy()
        self.mask = np.asarray(mask, bool).copy()

    @property
    def w_hat(self) -> np.ndarray:
        return np.array(
            [
                sum((a * b for a, b, on in zip(A, Bg, M, strict=True) if on), np.zeros(Bg.shape[1]))
                for A, Bg, M in zip(self.alpha, self.B, self.mask, strict=True)
            ]
        )

    def _amsgrad(self, g, m, v, v_max, t):
        b1, b2 = self.betas
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        v_max = np.maximum(v_max, v)
        p = self.lr / (1 - b1**t) * m
        h = (np.sqrt(v_max) + self.eps) / np.sqrt(1 - b2**t)
        return m, v, v_max, p, h

    def _update_w(self, g):
        self.t += 1
        self.m, self.v, self.v_max, p, h = self._amsgrad(g, self.m, self.v, self.v_max, self.t)
        return p, h

    def _update_alpha(self, g):
        self.t_a += 1
        g_a = np.einsum("gin,gn->gi", self.B, g) * self.mask + self.wd * self.alpha
        self.m_a, self.v_a, self.v_a_max, p, h = self._amsgrad(
            g_a, self.m_a, self.v_a, self.v_a_max, self.t_a
        )
        return p, h

    def basis_step(self, g, chosen=None) -> None:
        """`chosen`: the bases (G, I, n) and coordinates that the code under test ends at."""
        self._optimise(self.w_hat, *self._update_w(g), chosen)

    def ste_step(self, g, chosen=None) -> None:
        if self.w0 is None:
            self.w0 = self.w_hat
        p, h = self._update_w(g)
        self._optimise(self.w0, p, h, chosen)
        self.w0 = self.w0 - p / h

    def _optimise(self, w0, p, h, chosen) -> None:
        target = w0 - p / h
        for k in range(len(target)):
            own = None if chosen is None else (chosen[0][k], chosen[1][k])
            self.B[k], self.alpha[k] = self._optimise_group(k, target[k], w0[k], p[k], h[k], own)
            for i, b in enumerate(self.B[k]):
                self.m_a[k, i] = b @ self.m[k]
                self.v_a[k, i] = b @ np.diag(self.v[k]) @ b
                self.v_a_max[k, i] = b @ np.diag(self.v_max[k]) @ b
        self.t_a += 1

    def _optimise_group(self, k, target, w0, p, h, chosen) -> tuple[np.ndarray, np.ndarray]:
        """The new bases (I, n) and coordinates (I,) of group k."""
        live, near = np.flatnonzero(self.mask[k]), self._near(k, target)
        if chosen is None:
            B = np.zeros_like(self.B[k])
            B[live] = sign_patterns(len(live))[near.argmax(0)].T
            alpha = self._solve(k, B, w0, p, h)
            flips = np.where(alpha < 0, -1.0, 1.0)
            return B * flips[:, None], alpha * flips
        flipped, expected = chosen
        assert np.array_equal(np.abs(flipped).sum(1), self.mask[k] * len(target)), "dead signs"
        results = []
        for flips in sign_patterns(len(self.mask[k])):  # which bases have flipped since?
            B = flipped * flips[:, None]
            if (flips[~self.mask[k]] == 1).all() and near[codes(B[live]), range(len(target))].all():
                results.append(self._solve(k, B, w0, p, h) * flips)
        assert results, f"group {k}: there are levels nearer to the targets"
        return flipped, min(results, key=lambda alpha: np.abs(alpha - expected).max())

    def _near(self, k, target) -> np.ndarray:
        """(2^L, n) bool: which of group k's levels are nearest to the target (n,), ties and all."""
        distance = distances(target, self.alpha[k, self.mask[k]])
        near = distance <= distance.min(0) + self.tie * np.abs(target).max()
        self.tied[k] = (near.sum(0) > 1).any()
        return near

    def _solve(self, k, B, w0, p, h) -> np.ndarray:
        """Of group k: (B diag(h) B^T + R) a = B (h*w0 - p) + R alpha; no R alpha if R is given."""
        mask, pull = self.mask[k], self.ridge is None
        R = RIDGE * h.sum() if pull else self.ridge
        A = B @ np.diag(h) @ B.T + np.diag(np.where(mask, R, 1.0))
        return mask * np.linalg.solve(A, B @ (h * w0 - p) + pull * R * self.alpha[k] * mask)

    def coordinate_step(self, g) -> None:
        self._update_w(g)
        p_a, h_a = self._update_alpha(g)
        self.alpha = np.where(self.mask, self.alpha - p_a / h_a, 0)

    def removal_costs(self, g) -> np.ndarray:
        """The moments of a prune step, and f with +inf where no coordinate is left."""
        self._update_w(g)
        p_a, h_a = self._update_alpha(g)
        f = -p_a * self.alpha + 0.5 * self.alpha**2 * h_a
        return np.where(self.mask, f, np.inf)

    def remove(self, dead) -> None:
        self.mask &= ~dead
        self.alpha[dead] = 0
        self.B[dead] = 0


def prune(layers: list[Reference], gradients, top_k: float, M_p: float, chosen=None) -> None:
    """A prune step over all layers; `top_k` times each layer's live count must be whole.

    `chosen`: for each layer the mask that the code under test has after this step.
    """
    costs = [layer.removal_costs(g) for layer, g in zip(layers, gradients, strict=True)]
    candidates = []
    for number, (layer, f) in enumerate(zip(layers, costs, strict=True)):
        places = sorted(np.argwhere(layer.mask).tolist(), key=lambda place: f[tuple(place)])
        share = top_k * layer.mask.sum()
        assert share == int(share)
        candidates += [(f[tuple(place)], number, tuple(place)) for place in places[: int(share)]]
    candidates.sort(key=lambda candidate: candidate[0])
    cheapest = candidates[: int(M_p * len(candidates))]
    flags = [np.zeros_like(layer.mask) for layer in layers]
    for _, number, place in cheapest:
        flags[number][place] = True
    if chosen is not None:
        flags = [layer.mask & ~mask for layer, mask in zip(layers, chosen, strict=True)]
        removed = np.sort(np.concatenate([f[dead] for f, dead in zip(costs, flags, strict=True)]))
        scale = max(np.abs(f[np.isfinite(f)]).max(initial=0) for f in costs)
        np.testing.assert_allclose(
            removed, [f for f, *_ in cheapest], atol=layers[0].tie * scale, rtol=0,
            err_msg="not the cheapest coordinates were removed",
        )  # fmt: skip
    for layer, dead in zip(layers, flags, strict=True):
        layer.remove(dead)
