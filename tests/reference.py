"""The method in plain loops, one group and one weight at a time, float64: slow and obvious.

A `Reference` holds one layer as (G, n) and goes through the steps of SPEC section 5 as they are
written there. The fast code is stepped against it.
"""

from __future__ import annotations

import itertools

import numpy as np

RIDGE = 1e-6


def sketch_group(w: np.ndarray, I: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """One group -> its bases (k, n) and coordinates (k,), ascending; whether a sign was a tie.

    A tie is a residual of rounding size, whose sign is arbitrary (SPEC section 8).
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


def nearest_signs(t: float, alpha: np.ndarray) -> tuple[np.ndarray, float]:
    """The signs of the level nearest to t, and its distance: brute force over all 2^k levels."""
    best, distance = None, np.inf
    for signs in itertools.product((-1.0, 1.0), repeat=len(alpha)):
        d = abs(np.dot(signs, alpha) - t)
        if d < distance:
            best, distance = np.array(signs), d
    return best, distance


class Reference:
    """One layer, stepped with gradients (G, n)."""

    def __init__(self, B, alpha, mask, lr, betas=(0.9, 0.999), eps=1e-8, wd=0.0) -> None:
        self.B, self.alpha = np.asarray(B, float).copy(), np.asarray(alpha, float).copy()
        self.mask = np.asarray(mask, bool).copy()
        self.lr, self.betas, self.eps, self.wd = lr, betas, eps, wd
        G, I, n = self.B.shape
        self.t = self.t_a = 0
        self.m, self.v, self.v_max = (np.zeros((G, n)) for _ in range(3))
        self.m_a, self.v_a, self.v_a_max = (np.zeros((G, I)) for _ in range(3))
        self.w0 = None

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

    def basis_step(self, g) -> None:
        self._optimise(self.w_hat, *self._update_w(g))

    def ste_step(self, g) -> None:
        if self.w0 is None:
            self.w0 = self.w_hat
        p, h = self._update_w(g)
        self._optimise(self.w0, p, h)
        self.w0 = self.w0 - p / h

    def _optimise(self, w0, p, h) -> None:
        target = w0 - p / h
        G, I, n = self.B.shape
        for k in range(G):
            live = np.flatnonzero(self.mask[k])
            self.B[k] = 0
            for j in range(n):
                self.B[k, live, j], _ = nearest_signs(target[k, j], self.alpha[k, live])
            R = np.diag(np.where(self.mask[k], RIDGE, 1 + RIDGE))
            A = self.B[k] @ np.diag(h[k]) @ self.B[k].T + R
            alpha = np.linalg.solve(A, self.B[k] @ (h[k] * w0[k] - p[k]))
            for i in live:
                if alpha[i] < 0:
                    alpha[i], self.B[k, i] = -alpha[i], -self.B[k, i]
            self.alpha[k] = alpha * self.mask[k]
            for i in range(I):
                b = self.B[k, i]
                self.m_a[k, i] = b @ self.m[k]
                self.v_a[k, i] = b @ np.diag(self.v[k]) @ b
                self.v_a_max[k, i] = b @ np.diag(self.v_max[k]) @ b
        self.t_a += 1

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


def prune(layers: list[Reference], gradients, top_k: float, M_p: float) -> None:
    """A prune step over all layers; `top_k` times each layer's live count must be whole."""
    candidates = []
    for number, (layer, g) in enumerate(zip(layers, gradients, strict=True)):
        f = layer.removal_costs(g)
        places = sorted(np.argwhere(layer.mask).tolist(), key=lambda place: f[tuple(place)])
        share = top_k * layer.mask.sum()
        assert share == int(share)
        candidates += [(f[tuple(place)], number, tuple(place)) for place in places[: int(share)]]
    candidates.sort(key=lambda candidate: candidate[0])
    flags = [np.zeros_like(layer.mask) for layer in layers]
    for _, number, place in candidates[: int(M_p * len(candidates))]:
        flags[number][place] = True
    for layer, dead in zip(layers, flags, strict=True):
        layer.remove(dead)
