"""The optimizer of multi-bit weights: its state, around the arithmetic of `alq.method.steps`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import InputError
from ..machine.arithmetic import optimizer_step
from . import steps
from .checks import check_gradients, check_weights, list_of
from .families import Family, families
from .loss_model import AMSGrad, pseudo_gradient_and_hessian, update_moments
from .stacks import MOMENTS, Stack
from .steps import choose_pruned, removal_cost, round_at_random
from .weight import MultiBitWeight, check_state, copied


class ALQ(Optimizer):
    """Adaptive loss-aware quantization: four steps on multi-bit weights.

    Each step reads the parameters' `.grad` (g below, reshaped to (G, n)), updates AMSGrad moments
    and leaves w_hat in the parameters. p and h are those of `alq.method.loss_model`. A gradient
    that is not finite makes the weights NaN, as in torch's optimizers. To skip such a batch, as
    `GradScaler` does, look before the step.

    Arguments:
        weights: what `alq.quantize` returned.
        lr: learning rate.  betas, eps: of AMSGrad.
        weight_decay: wd of `coordinate_step` and `prune_step`.
        generator: of the random rounding in `prune_step`, on the CPU; None takes torch's own.
        ridge: of the solve for alpha. None pulls what the bases do not determine to the present
            alpha, by a share of the group's own h; a number is the published ridge, towards 0.
    """

    def __init__(
        self,
        weights: Sequence[MultiBitWeight],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
        ridge: float | None = None,
    ) -> None:
        if not lr >= 0:
            raise InputError(f"lr {lr}: must be 0 or more", "lr")
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"betas {betas}: each must be at least 0 and below 1", "betas")
        if not eps > 0:
            raise InputError(f"eps {eps}: must be above 0, as h is divided by", "eps")
        if not weight_decay >= 0:
            raise InputError(f"weight_decay {weight_decay}: must be 0 or more", "weight_decay")
        if ridge is not None and not ridge > 0:
            raise InputError(f"ridge {ridge}: must be above 0, or None for a relative one", "ridge")
        self.weights = list_of(weights)
        check_weights(self.weights)
        self.generator = generator
        self.ridge = ridge
        self._families: list[Family] = []  # the layers as steps take them, from the first on
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([weight.parameter for weight in self.weights], defaults)
        for weight in self.weights:
            self.state[weight.parameter] = {
                "step": 0,  # t of the moments in the w domain
                "step_a": 0,  # t of the moments in the alpha domain
                **{key: weight.alpha.new_zeros(weight.G, weight.n) for key in MOMENTS},
                # (G, I) m_a, v_a, v_a_max; None after a new B, until a step asks for them
                "alpha_moments": None,
                "w0": None,  # (G, n): full-precision copy, from the first ste_step on
            }

    def add_param_group(self, param_group: dict) -> None:
        """Take the group that `__init__` gives; InputError for any other."""
        if self.param_groups:
            raise InputError(
                "ALQ: trains the multi-bit weights that it was made of; other parameters want "
                "another optimizer"
            )
        super().add_param_group(param_group)

    # ------------------------------------------------------------------------ the four steps

    @optimizer_step
    def basis_step(self) -> None:
        """Optimise the bases with the coordinates fixed, then the coordinates.

        target = w_hat - p/h
        B = the signs of the level nearest to the target, weight by weight
        alpha = argmin_a d.p + 1/2 d.(h*d),  d = B^T a - w_hat
        """
        for family in self._advance():
            for stack, arithmetic in self._with_arithmetic(family):
                stack.optimise_bases(arithmetic, self.amsgrad, self.ridge)

    @optimizer_step
    def ste_step(self) -> None:
        """Straight-through: a basis step from the full-precision copy w0, which then moves.

        The basis step with w0 for w_hat;  then w0 = w0 - p/h
        """
        for family in self._advance():
            for stack, arithmetic in self._with_arithmetic(family):
                stack.begin_copy()
                stack.optimise_bases(arithmetic, self.amsgrad, self.ridge, stack.w0)

    @optimizer_step
    def coordinate_step(self) -> None:
        """Optimise the coordinates with the bases fixed. One may turn negative.

        g_a = B g + wd*alpha
        alpha = alpha - p_a/h_a
        """
        for family in self._advance():
            p_a, h_a = self._coordinate_loss_model(family)
            family.alpha.copy_(torch.where(family.mask, family.alpha - p_a / h_a, 0.0))
            for stack, arithmetic in self._with_arithmetic(family):
                stack.rebuild(arithmetic)

    @optimizer_step
    def prune_step(
        self, top_k: float, M_p: float, prices: Sequence[int | Tensor] | None = None,
        budget: int = 0, worth: Sequence[Tensor] | None = None,
        choose: Callable[..., list[Tensor]] = choose_pruned,
    ) -> None:  # fmt: skip
        """Remove coordinates, the cheapest over all layers first; alpha does not move.

        f = -p_a*alpha + 1/2*alpha^2*h_a
        candidates: in each layer the `top_k` share of its live coordinates with the least f,
                    the count's fraction rounded up at random with that probability
        remove the `M_p` share of all candidates with the least f, rounded down; given `prices`,
                    the bits a coordinate takes, of a layer or of each of its groups (G, 1), only
                    until `budget` are freed

        `worth` (G, 1) of each layer ranks f / worth in the place of f. `choose` takes the place of
        `steps.choose_pruned`.
        """
        if not (0 < top_k <= 1 and 0 <= M_p <= 1):
            raise InputError(f"top_k {top_k}, M_p {M_p}: are shares, above 0 and at most 1")
        costs: dict[MultiBitWeight, Tensor] = {}
        for family in self._advance():
            p_a, h_a = self._coordinate_loss_model(family)
            f = removal_cost(family.alpha, p_a, h_a)
            costs |= family.of_layers(f)
        shares = [top_k * weight.live_total for weight in self.weights]
        candidates = round_at_random(shares, self.generator)
        masks = [weight.mask for weight in self.weights]
        ranked = [costs[weight] for weight in self.weights]
        if worth is not None:
            ranked = [f / each for f, each in zip(ranked, worth, strict=True)]
        chosen = choose(ranked, masks, candidates, M_p, prices, budget)
        for family in self._families:
            family.prune(dict(zip(self.weights, chosen, strict=True)))
        for family in self._arranged():
            for stack, arithmetic in self._with_arithmetic(family):
                stack.rebuild(arithmetic)

    def step(self, closure: Callable | None = None) -> NoReturn:
        """Not defined: choose one of the four steps."""
        raise NotImplementedError("call basis_step, coordinate_step, ste_step or prune_step")

    # ------------------------------------------------------------------------ what they share

    @property
    def amsgrad(self) -> AMSGrad:
        """The numbers of AMSGrad as they are now."""
        return AMSGrad(*(self.param_groups[0][key] for key in AMSGrad._fields))

    def _arranged(self) -> list[Family]:
        """Return the layers as they are worked on."""
        if not (self._families and all(x.is_current(self.state) for x in self._families)):
            self._families = []  # what they hold is let go as the layers move
            self._families = families(self.weights, self.state)
        return self._families

    def _advance(self) -> list[Family]:
        """Count a step and return the layers; InputError if any has no gradient."""
        check_gradients(self.weights)
        for weight in self.weights:
            self.state[weight.parameter]["step"] += 1
            self.state[weight.parameter]["step_a"] += 1
        arranged = self._arranged()
        for family in arranged:
            family.spoil_if_not_finite()
        return arranged

    def arithmetic(self, weight: MultiBitWeight) -> Any:
        """Return the module whose BLOCK and four functions (`alq.method.steps`) a step takes.

        `weight` is any of a stack.
        """
        return steps

    def _with_arithmetic(self, family: Family) -> Iterator[tuple[Stack, Any]]:
        """Yield each stack with its arithmetic."""
        for stack in family.stacks:
            yield stack, self.arithmetic(stack.weights[0])

    def _coordinate_loss_model(self, family: Family) -> tuple[Tensor, Tensor]:
        """Update the moments of the weights and of the coordinates; return p_a and h_a, vectors."""
        amsgrad, g_a = self.amsgrad, torch.zeros_like(family.alpha)
        pairs = zip(self._with_arithmetic(family), family.parts(g_a), strict=True)
        for (stack, arithmetic), part in pairs:
            stack.project(arithmetic, amsgrad.betas, part)
        if decay := self.param_groups[0]["weight_decay"]:
            g_a += decay * family.alpha
        m_a, v_a, v_a_max = family.alpha_moments
        update_moments(g_a, m_a, v_a, v_a_max, amsgrad.betas)
        return pseudo_gradient_and_hessian(m_a, v_a_max, *amsgrad.at(family.step_a))

    # ------------------------------------------------------------------------ saving

    def __getstate__(self) -> dict:
        """Return what copies and pickles take: torch's own leave out all that is not torch's."""
        for family in self._families:
            family.dissolve()
        self._families = []
        return vars(self).copy()

    def state_dict(self) -> dict:
        """Return all that the next step depends on: moments, counters, B, alpha, mask, w0."""
        generator = None if self.generator is None else self.generator.get_state()
        return {
            "weights": [weight.state_dict() for weight in self.weights],
            "state": [copied(self.state[w.parameter], "cpu") for w in self.weights],
            "param_groups": super().state_dict()["param_groups"],
            "generator": generator,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Go back to where `state_dict` was taken; InputError names a layer that does not fit."""
        forms = state_dict["weights"]
        if len(forms) != len(self.weights):
            raise InputError(f"the state has {len(forms)} layers, the network {len(self.weights)}")
        for weight, form in zip(self.weights, forms, strict=True):
            check_state(weight.name, weight.grouping, form)  # before any of them changes
        for weight, form, state in zip(self.weights, forms, state_dict["state"], strict=True):
            weight.load_state_dict(form)
            self.state[weight.parameter] = copied(state, weight.parameter.device)
        for group, values in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in values.items() if k != "params"})
        if self.generator is not None and state_dict["generator"] is not None:
            self.generator.set_state(state_dict["generator"])
