"""One optimiser step: the study's batch in parts that fit a device, over all processes, in a chosen precision."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from consistency.base.errors import UserError
from consistency.base.seeding import derived_seed, generator
from consistency.nets.denoiser import Denoiser
from consistency.runtime.distributed import Ranks
from consistency.training.objective import Objective, Shape, Term, WholeBatch
from consistency.training.stopwatch import Stopwatch

#: the term whose weight the adaptive balance scales
BALANCED = "dsm"


def share_of(batch: int, batch_per_device: int | None, ranks: Ranks) -> tuple[slice, int]:
    """Return this process's rows of the batch, and the number of rows that go through the device at once.

    Raises UserError if the batch cannot be divided like that.
    """
    share, rest = divmod(batch, ranks.world)
    if rest:
        raise UserError(
            f"a batch of {batch} cannot be shared by {ranks.world} processes: use a number of processes that divides it"
        )
    part = min(batch_per_device or share, share)
    if share % part:
        raise UserError(
            f"compute.batch_per_device {part} does not divide the {share} images of a process (a batch of {batch} on "
            f"{ranks.world}): use a divisor of {share}"
        )
    return slice(ranks.rank * share, (ranks.rank + 1) * share), part


@dataclass(frozen=True)
class Stream:
    """Images and randomness of a training's steps. images: maps a step to this process's images and labels; batch:
    images of a step over all processes; part: images at once; draws of step k depend on (seed, purpose, k) alone."""

    images: Callable[[int], tuple[Tensor, Tensor | None]]
    batch: int
    part: int
    seed: int
    purpose: str


@dataclass
class Update:
    """One optimiser step of a training.

    adaptive: the DSM term is scaled by ||grad distillation|| / (||grad dsm|| + 1e-4) at the output layer (at_block: at
    the last convolution of the last residual block), at most 1e4, as in CTM's code, but over the whole batch: there,
    each micro-batch has a ratio of its own. scaler: of float16's losses. Raises UserError if there is no such block.
    """

    model: Denoiser
    optimizer: torch.optim.Optimizer
    objective: Objective
    stream: Stream
    adaptive: bool = False
    at_block: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))

    def __post_init__(self) -> None:
        self._parameters = list(self.model.parameters())
        self._aside: list[Tensor | None] = [None] * len(self._parameters)
        end = ".conv1.weight" if self.at_block else ""
        layers = [k for k, (name, w) in enumerate(self.model.named_parameters()) if w.ndim > 1 and name.endswith(end)]
        if not layers:
            raise UserError(
                "dsm_balance adaptive-block is for U-Nets: this network has no residual blocks; use adaptive"
            )
        self._last = layers[-1]

    def step(self, step: int) -> tuple[dict[str, Tensor], int]:
        """Take one optimiser step. Returns its terms, with "loss" and "grad_norm", and this process's evaluations.

        The terms are this process's means; the gradient, its norm and the balance are those of the whole batch.
        """
        torch.manual_seed(
            derived_seed(self.stream.seed, f"dropout {self.ranks.rank}" if self.ranks.rank else "dropout", step)
        )
        self.optimizer.zero_grad(set_to_none=True)
        means: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        evaluations = 0
        for term in self._terms(step):
            with self.stopwatch.part("backward"):
                self._backward(term)
            weights[term.name] = term.weight
            means[term.name] = means.get(term.name, 0) + term.value.detach() * self._portion
            evaluations += term.evaluations
        with self.stopwatch.part("optimizer"):
            balance = self._gather_gradients(weights)
            loss = sum((means[name] * weights[name] for name in means if name != BALANCED), torch.zeros(()))
            if BALANCED in means:
                # If float16 overflowed in both terms there is no ratio; the step is skipped anyway.
                balance = torch.where(torch.isfinite(balance), balance, 0.0) if self.scaler.is_enabled() else balance
                loss = loss + means[BALANCED] * weights[BALANCED] * balance
                means |= {"dsm_balance": balance} if self.adaptive else {}
            norm = self._apply()
        return {"loss": loss, **means, "grad_norm": norm}, evaluations

    @property
    def _share(self) -> int:
        return self.stream.batch // self.ranks.world

    @property
    def _portion(self) -> float:
        """Fraction of this process's images in a part."""
        return self.stream.part / self._share

    def _terms(self, step: int) -> Iterator[Term]:
        """Yield the terms of all parts of this process's share, part by part."""
        stream = self.stream
        with self.stopwatch.part("data"):
            images, labels = stream.images(step)
            shape: Shape = (stream.batch, images.shape[1], images.shape[2], images.shape[3])
            host = generator(stream.seed, stream.purpose, step)
            device = generator(stream.seed, f"{stream.purpose} noise", step, images.device)
            draws = self.objective.draw(shape, step, host, device)
            if isinstance(self.objective, WholeBatch):
                all_labels = None if labels is None else self.ranks.gathered(labels)
                draws = self.objective.pair(self.ranks.gathered(images), all_labels, draws)
        first = self.ranks.rank * self._share
        for start in range(0, self._share, stream.part):
            rows = slice(start, start + stream.part)
            here = draws.part(slice(first + rows.start, first + rows.stop))
            terms = self.objective.terms(images[rows], None if labels is None else labels[rows], here)
            while True:
                with self.stopwatch.part("forward"):
                    term = next(terms, None)
                if term is None:
                    break
                yield term

    def _backward(self, term: Term) -> None:
        """Add the term's gradients to the model's or, for a term yet to be balanced, to a separate set."""
        apart = self.adaptive and term.name == BALANCED
        weight = self._portion if apart else self._portion * term.weight
        with self._gradients_aside() if apart else contextlib.nullcontext():
            self.scaler.scale(term.value * weight).backward()

    @contextlib.contextmanager
    def _gradients_aside(self) -> Iterator[None]:
        """Swap the balanced term's set in as the parameters' gradients within the block."""
        main = [parameter.grad for parameter in self._parameters]
        self._set_gradients(self._aside)
        yield
        self._aside = [parameter.grad for parameter in self._parameters]
        self._set_gradients(main)

    def _set_gradients(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _gather_gradients(self, weights: dict[str, float]) -> Tensor:
        """Average over the processes, then add the balanced term. Returns its balance (1 if that is fixed)."""
        main = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        apart = [gradient for gradient in self._aside if gradient is not None]
        self.ranks.mean_([*main, *apart])
        if not apart:
            return main[0].new_ones(())
        distillation, dsm = self._parameters[self._last].grad, self._aside[self._last]
        assert distillation is not None and dsm is not None
        # float16's loss scale cancels in the ratio; the small number is scaled with it to keep its effect.
        small = 1e-4 * self.scaler.scale(distillation.new_ones(()))
        balance = (distillation.norm() / (dsm.norm() + small)).clamp(max=1e4)
        for parameter, gradient in zip(self._parameters, self._aside, strict=True):
            if gradient is not None:
                scaled = gradient * (balance * weights[BALANCED])
                parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)
        self._aside = [None] * len(self._parameters)
        return balance

    def _apply(self) -> Tensor:
        """Apply the optimiser's step. Returns the gradient norm."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm
