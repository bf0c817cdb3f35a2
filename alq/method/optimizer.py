"""The optimizer of multi-bit weights: thin state around the arithmetic of `alq.method.steps`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import InputError
from ..machine.arithmetic import optimizer_step
from .codes import basis_products, blocks
from .loss_model import pseudo_gradient_and_hessian, update_moments
from .steps import alpha_moments, choose_pruned, optimise_bases, removal_cost
from .structures import coordinate_bytes
from .weight import MultiBitWeight, check_state, live_counts


class ALQ(Optimizer):
    """Adaptive loss-aware quantization: four steps on multi-bit weights.

    Each step reads the parameters' `.grad` (g below, reshaped to (G, n)), updates AMSGrad moments
    and leaves w_hat in the parameters. With p and h of the loss model (`alq.method.loss_model`):

        basis_step       t = w_hat - p/h;  B = nearest levels to t;  alpha = argmin of the model
        coordinate_step  g_a = B g + wd*alpha;  alpha = alpha - p_a/h_a;  w_hat = B^T alpha
        prune_step       f = -p_a*alpha + 1/2*alpha^2*h_a;  remove the cheapest coordinates
        ste_step         as basis_step from a full-precision copy w0;  then w0 = w0 - p/h

    Arguments:
        weights: what `alq.quantize` returned.
        lr: learning rate.  betas, eps: of AMSGrad.
        weight_decay: wd above, on the coordinates.
        generator: of the random rounding in `prune_step`, on the CPU; None takes torch's own.
    """

    block: int | None = None  # weights worked on at a time; None takes the device's

    def __init__(
        self,
        weights: Sequence[MultiBitWeight],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if not lr >= 0:
            raise InputError(f"lr {lr}: must be 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"betas {betas}: each must be at least 0 and below 1")
        if not eps > 0:
            raise InputError(f"eps {eps}: must be above 0, as h is divided by")
        if not weight_decay >= 0:
            raise InputError(f"weight_decay {weight_decay}: must be 0 or more")
        self.weights = list(weights)
        self.generator = generator
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([weight.parameter for weight in self.weights], defaults)
        for weight in self.weights:
            m, v, v_max = (weight.alpha.new_zeros(weight.G, weight.n) for _ in range(3))
            self.state[weight.parameter] = {
                "step": 0,  # t of the moments in the w domain
                "step_a": 0,  # t of the moments in the alpha domain
                "m": m,  # (G, n)
                "v": v,
                "v_max": v_max,
                # (G, I) m_a, v_a, v_a_max; None after a new B, until a step asks for them
                "alpha_moments": None,
                "w0": None,  # (G, n): full-precision copy, from the first ste_step on
            }

    @optimizer_step
    def basis_step(self) -> None:
        """Optimise the bases, then the coordinates (`steps.optimise_bases`)."""
        for weight, state in self._layers():
            base = weight.grouping.to_groups(weight.parameter)
            self._optimise(weight, state, base, move_base=False)

    @optimizer_step
    def ste_step(self) -> None:
        """Straight-through: the basis step from the full-precision copy w0, which then moves."""
        for weight, state in self._layers():
            if state["w0"] is None:
                state["w0"] = weight.grouping.to_groups(weight.parameter).clone()
            self._optimise(weight, state, state["w0"], move_base=True)

    @optimizer_step
    def coordinate_step(self) -> None:
        """Optimise the coordinates with the bases fixed. One may turn negative."""
        for weight, state in self._layers():
            p_a, h_a = self._update_both_moments(weight, state)
            weight.alpha = torch.where(weight.mask, weight.alpha - p_a / h_a, 0.0)
            self._write(weight)

    @optimizer_step
    def prune_step(
        self,
        top_k: float,
        M_p: float,
        prices: Sequence[int] | None = None,
        budget: int = 0,
        per_byte: bool = False,
    ) -> None:
        """Remove coordinates, the cheapest over all layers first; alpha does not move.

        f = -p_a*alpha + 1/2*alpha^2*h_a
        candidates: in each layer the `top_k` share of its live coordinates with the least f,
                    the count's fraction rounded up at random with that probability
        remove the `M_p` share of all candidates with the least f, rounded down; given `prices`,
                    the bits a coordinate of each layer takes, only until `budget` are freed

        `per_byte` ranks f by what removing the coordinate saves: f / (n/8 + 4).
        """
        if not (0 < top_k <= 1 and 0 <= M_p <= 1):
            raise InputError(f"top_k {top_k}, M_p {M_p}: are shares, above 0 and at most 1")
        costs, candidates = [], []
        for weight, state in self._layers():
            p_a, h_a = self._update_both_moments(weight, state)
            f = removal_cost(weight.alpha, p_a, h_a)
            costs.append(f / coordinate_bytes(weight.n) if per_byte else f)
            share = top_k * weight.live_total
            draw = torch.rand((), generator=self.generator).item()  # on the host: no device waits
            candidates.append(int(share) + (draw < share - int(share)))
        masks = [weight.mask for weight in self.weights]
        dead = choose_pruned(costs, masks, candidates, M_p, prices, budget)
        for weight, flags in zip(self.weights, dead, strict=True):
            weight.prune(flags)
        # The one point where the host waits for the device.
        for weight, counts in zip(self.weights, live_counts(self.weights), strict=True):
            weight.count_live(*counts)
            self._write(weight)

    @property
    def steps_done(self) -> int:
        """Steps taken since the moments were 0, of whatever kind."""
        return self.state[self.weights[0].parameter]["step"]

    def step(self, closure: None = None) -> None:
        """Not defined: choose one of the four steps."""
        raise NotImplementedError("call basis_step, coordinate_step, ste_step or prune_step")

    def state_dict(self) -> dict:
        """All that the next step depends on: moments, counters, B, alpha, mask, base points."""
        generator = None if self.generator is None else self.generator.get_state()
        return {
            "weights": [weight.state_dict() for weight in self.weights],
            "state": [_map_tensors(self.state[w.parameter], _copied) for w in self.weights],
            "param_groups": super().state_dict()["param_groups"],
            "generator": generator,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Go back to where `state_dict` was taken; InputError names a layer that does not fit."""
        if len(state_dict["weights"]) != len(self.weights):
            count = len(state_dict["weights"])
            raise InputError(f"the state has {count} layers, the network {len(self.weights)}")
        for weight, weight_state in zip(self.weights, state_dict["weights"], strict=True):
            check_state(weight.name, weight.grouping, weight_state)  # before any of them changes
        saved = zip(self.weights, state_dict["weights"], state_dict["state"], strict=True)
        for weight, weight_state, state in saved:
            weight.load_state_dict(weight_state)
            weight.write()
            device = weight.parameter.device
            self.state[weight.parameter] = _map_tensors(
                state, lambda x, d=device: x.to(d, copy=True)
            )
        for group, values in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in values.items() if k != "params"})
        if self.generator is not None and state_dict["generator"] is not None:
            self.generator.set_state(state_dict["generator"])

    # ------------------------------------------------------------------------ what the steps share

    def _layers(self) -> Iterator[tuple[MultiBitWeight, dict]]:
        for weight in self.weights:  # before any of them changes
            if weight.parameter.grad is None:
                raise InputError(
                    f"{weight.name}: no gradient; call backward() before the step, "
                    "or leave the layer out with skip= if no batch reaches it"
                )
        for weight in self.weights:
            yield weight, self.state[weight.parameter]

    def _optimise(self, weight: MultiBitWeight, state: dict, base: Tensor, move_base: bool) -> None:
        """`optimise_bases` in blocks of groups, from `base` (G, n), which becomes t if it moves."""
        g = self._gradient(weight)
        w_hat = weight.grouping.to_groups(weight.parameter)  # (G, n), all of it written to
        live = weight.live_first(weight.mask)  # (G, L)
        alpha = weight.live_first(weight.alpha)  # (G, L)
        state["step"] += 1
        state["step_a"] += 1
        state["alpha_moments"] = None
        for block in blocks(weight.codes, weight.L, self.block):
            moments = [state[key][block] for key in ("m", "v", "v_max")]
            alpha[block] = self._optimise_block(
                g[block], moments, base[block], weight.codes[block], alpha[block], live[block],
                w_hat[block], state["step"], move_base,
            )  # fmt: skip
        weight.alpha = weight.in_place(alpha)
        weight.write(w_hat)

    def _optimise_block(
        self, g: Tensor, moments: list[Tensor], w0: Tensor, codes: Tensor, alpha: Tensor,
        live: Tensor, w_hat: Tensor, t: int, move_base: bool,
    ) -> Tensor:  # fmt: skip
        """Update moments, for the `t`-th time; write codes, w_hat and, if it moves, w0.

        Returns: the new alpha (G, L).
        """
        update_moments(g, *moments, self.param_groups[0]["betas"])
        m, _, v_max = moments
        p, h = self._pseudo_gradient_and_hessian(m, v_max, t)
        new_codes, alpha, new_w_hat, unconstrained = optimise_bases(w0, p, h, alpha, live)
        codes.copy_(new_codes)
        w_hat.copy_(new_w_hat)
        if move_base:
            w0.copy_(unconstrained)
        return alpha

    def _update_both_moments(self, weight: MultiBitWeight, state: dict) -> tuple[Tensor, Tensor]:
        """Update the moments in both domains, each with its own gradient; p_a and h_a (G, I)."""
        group = self.param_groups[0]
        g = self._gradient(weight)
        live = weight.live_first(weight.mask)
        state["step"] += 1
        state["step_a"] += 1
        derive = state["alpha_moments"] is None
        products = [torch.empty_like(live, dtype=g.dtype) for _ in range(4 if derive else 1)]
        for block in blocks(weight.codes, weight.L, self.block):
            moments = [state[key][block] for key in ("m", "v", "v_max")]
            parts = self._products_block(
                g[block], moments, weight.codes[block], live[block], derive
            )
            for whole, part in zip(products, parts, strict=True):
                whole[block] = part
        g_a, *derived = (weight.in_place(x) for x in products)  # (G, I)
        if derive:
            state["alpha_moments"] = derived
        g_a = g_a + group["weight_decay"] * weight.alpha
        m_a, v_a, v_a_max = state["alpha_moments"]
        update_moments(g_a, m_a, v_a, v_a_max, group["betas"])
        return self._pseudo_gradient_and_hessian(m_a, v_a_max, state["step_a"])

    def _products_block(
        self, g: Tensor, moments: list[Tensor], codes: Tensor, live: Tensor, derive: bool
    ) -> list[Tensor]:
        """Update the moments; B g, and what the coordinates' moments derive from if asked for."""
        index = codes.long()
        derived = alpha_moments(*moments, index, live) if derive else ()
        update_moments(g, *moments, self.param_groups[0]["betas"])
        return [basis_products(g, index, live), *derived]

    def _write(self, weight: MultiBitWeight) -> None:
        """w_hat of new coordinates into the parameter."""
        weight.write()

    def _pseudo_gradient_and_hessian(
        self, m: Tensor, v_max: Tensor, t: int
    ) -> tuple[Tensor, Tensor]:
        group = self.param_groups[0]
        return pseudo_gradient_and_hessian(m, v_max, t, group["lr"], group["betas"], group["eps"])

    @staticmethod
    def _gradient(weight: MultiBitWeight) -> Tensor:
        return weight.grouping.to_groups(weight.parameter.grad)


def _copied(x: Tensor) -> Tensor:
    return x.to("cpu", copy=True)


def _map_tensors(state: dict, function) -> dict:
    """`state` with `function` applied to its tensors, also those in lists."""

    def convert(value: object) -> object:
        if isinstance(value, Tensor):
            return function(value)
        return [function(x) for x in value] if isinstance(value, list) else value

    return {key: convert(value) for key, value in state.items()}
