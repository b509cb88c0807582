"""What training changes: the model, its averages, the optimiser, and how much was passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from experiment.averages import Average, Mould, Profile
from experiment.faults import Faults
from experiment.processes import DDP, Processes
from experiment.speed import Speed
from score_models import Objective, ScoreModel
from sde_lib.memory import out_of_memory


class BatchLoss(nn.Module):
    """Model and objective as one module: all that is trained, averaged and shared by processes.

    Args:
        model: The score model.
        objective: Its loss; may have weights and a state of its own.
    """

    def __init__(self, model: ScoreModel, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x0: Tensor, draws: Mapping[str, Tensor], cond: Tensor | None) -> Tensor:
        """Loss of each sample [B]."""
        return self.objective.loss(self.model, x0, draws, cond)


class State:
    """Model, objective, averages and optimiser, as much of them as this process holds.

    Args:
        model: On its device, with the weights to begin from; trained in place.
        objective: What is minimised.
        profiles: Of the averages, at least one; the first is the one that is evaluated.
        adam: Learning rate, betas and weight decay of AdamW.
        speed: Precision and compilation of the network.
        processes: Those that train together.
    """

    def __init__(
        self,
        model: ScoreModel,
        objective: Objective,
        profiles: list[Profile],
        adam: Mapping[str, Any],
        *,
        speed: Speed | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.speed, self.processes = speed or Speed(), processes or DDP()
        self.device = next(model.parameters()).device
        self.trained = BatchLoss(model, objective).to(self.device)
        self.trained.train()
        self.mould = Mould(self.trained)
        with all_in_memory():
            quick = self.speed.of_model(model, self.device, contiguous=self.processes.parted)
            self.loss = self.processes.spread(BatchLoss(quick, objective), self.device)
            self.weights = self.processes.weights(self.trained)
            self.names = names_of(self.trained)
            self._moving = [n for n, weight in enumerate(self.weights) if weight.requires_grad]
            self.averages = [Average(profile, self.weights) for profile in profiles]
            self.optimizer = self._adam(adam)
        self.scale = self.speed.loss_scale(self.device)
        self.faults = Faults(self.device)
        self.iteration = 0

    def _adam(self, arguments: Mapping[str, Any]) -> torch.optim.AdamW:
        """The optimiser, with what it would make in its first step, where no remedy is left."""
        moving = [self.weights[n] for n in self._moving]
        optimizer = torch.optim.AdamW(moving, fused=True, **arguments)
        fresh = {
            number: {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
            for number, weight in enumerate(moving)
        }
        optimizer.load_state_dict(optimizer.state_dict() | {"state": fresh})
        return optimizer

    @property
    def model(self) -> ScoreModel:
        """The model in training."""
        return self.trained.model

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self.trained.objective

    @property
    def ema(self) -> ScoreModel:
        """The first average, whole, in evaluation mode; all processes have to ask."""
        return self.average(0).model

    def average(self, index: int) -> BatchLoss:
        """An average of all that is trained, whole; all processes have to ask."""
        wholes = self._through(self.processes.whole, self.averages[index].weights)
        return self.mould.around(wholes, self.trained.buffers())

    @torch.no_grad()
    def update(self, loss: Tensor, lr: float, clip: float) -> tuple[Tensor, Tensor]:
        """One step of optimiser and averages from the gradients; none if they are not finite.

        The gradient is scaled down to the norm ``clip`` within the optimiser's own pass over it.
        The host does not wait for a GPU; there the averages count an iteration that was passed
        over as one in which the weights stayed.

        Args:
            loss: Mean over the batch, [].
            lr: Learning rate.
            clip: Largest norm of the gradient.

        Returns:
            The norm before clipping, and whether the update was left out, both on the device.
        """
        self.processes.collect(self.trained, self.weights)
        norm = self.processes.norm(self.weights) / self.scale.factor
        bad = ~torch.isfinite(loss + norm)
        overflow = self.scale.overflowed(bad)
        skip = overflow | self.faults.note(bad & ~overflow, loss, norm, self.iteration)
        divisor = self.scale.factor * (norm / clip).clamp(min=1.0)
        self.scale.adapt(overflow)
        if self.device.type == "cpu" and bool(skip):  # asking a CPU costs nothing
            return norm, skip
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.grad_scale = divisor
        self.optimizer.found_inf = None if self.device.type == "cpu" else skip.float()
        self.optimizer.step()
        for average in self.averages:
            average.update(self.weights, self.iteration)
        return norm, skip

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on to the bit; batches and noise follow from (seed, iteration).

        All processes have to ask; nothing in it depends on their number. Only the first gets
        whole tensors.
        """
        trained = self._stored(self.weights)
        averages = [self._stored(average.weights) for average in self.averages]
        return {
            "model": trained["model"],
            "ema": averages[0]["model"],
            "objective": trained["objective"],
            "objective_ema": averages[0]["objective"],
            "averages": {
                average.profile.name: stored
                for average, stored in zip(self.averages, averages, strict=True)
            },
            "optimizer": self._optimizer_state(),
            "loss_scale": self.scale.state_dict(),
            "skipped": self.faults.skipped,
        }

    def snapshot(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """The averages that others can be made of, by name, as :meth:`state_dict` has them.

        All processes have to ask; only the first gets whole tensors.
        """
        return {
            average.profile.name: self._stored(average.weights)
            for average in self.averages
            if average.profile.combines
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; averages that it lacks begin from its weights.

        Raises:
            RunError: If there is one that cannot.
        """
        objective, iteration = state.get("objective", {}), int(state["iteration"])
        first = {"model": state["ema"], "objective": state.get("objective_ema", objective)}
        stored = state.get("averages", {self.averages[0].profile.name: first})
        for average in self.averages:
            if average.profile.name not in stored:
                average.profile.begin_late(iteration)
        tensors = self._restore(self.weights, state["model"], objective)
        for name, buffer in self.trained.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])
        nearest = first
        for average in self.averages:
            parts = stored.get(average.profile.name, nearest)
            self._restore(average.weights, parts["model"], parts["objective"])
            nearest = {"model": state["model"], "objective": objective}
        self._load_optimizer(state["optimizer"])
        self.scale.load_state_dict(state.get("loss_scale", {"start": 0.0}))
        self.iteration = iteration
        self.faults = Faults(self.device, self.faults.allowed, int(state["skipped"]))

    def _through(
        self, change: Callable[[Tensor, Tensor], Tensor], tensors: Iterable[Tensor]
    ) -> Iterator[Tensor]:
        """Parts of all weights as wholes, or the other way round, one at a time."""
        return map(change, tensors, self.trained.parameters())

    def _stored(self, parts: list[Tensor]) -> dict[str, dict[str, Tensor]]:
        """All tensors by room, those of ``model`` and of ``objective``, with these weights; what
        else there is, averages have in common with what is trained."""
        tensors = dict(self.trained.state_dict())
        wholes = self._through(self.processes.told, (part.detach() for part in parts))
        for names, whole in zip(self.names, wholes, strict=True):
            tensors |= dict.fromkeys(names, whole)
        return {
            room: {
                name.removeprefix(f"{room}."): values
                for name, values in tensors.items()
                if name.startswith(f"{room}.")
            }
            for room in ("model", "objective")
        }

    @torch.no_grad()
    def _restore(
        self, parts: list[Tensor], model: Mapping[str, Tensor], objective: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """All tensors that there are, after ``parts`` have become those of the weights."""
        tensors = {f"model.{name}": values for name, values in model.items()}
        tensors |= {f"objective.{name}": values for name, values in objective.items()}
        wholes = (tensors[names[0]] for names in self.names)
        for own, part in zip(parts, self._through(self.processes.part, wholes), strict=True):
            own.copy_(part)
        return tensors

    def _likes(self) -> list[nn.Parameter]:
        """The parameters that the optimiser changes, as the modules hold them."""
        parameters = list(self.trained.parameters())
        return [parameters[n] for n in self._moving]

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimiser's own, with the parts of all processes put together."""
        state, likes = self.optimizer.state_dict(), self._likes()
        state["state"] = {
            number: {name: self.processes.told(v, likes[number]) for name, v in values.items()}
            for number, values in state["state"].items()
        }
        return state

    @torch.no_grad()
    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Into the memory that is there, laid out as the weights of this run are."""
        likes, moving = self._likes(), self.optimizer.param_groups[0]["params"]
        for number, values in state["state"].items():
            own = self.optimizer.state[moving[number]]
            for name, whole in values.items():
                own[name].copy_(self.processes.part(whole, likes[number]))


def names_of(module: nn.Module) -> list[list[str]]:
    """All names of each parameter, in the order of ``module.parameters()``; a weight that two
    layers share has two."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return list(found.values())


@contextmanager
def all_in_memory() -> Iterator[None]:
    """Within it is made what stays until the end of training, whatever the batch.

    Raises:
        MemoryError: If it does not fit, with what to do.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(
            "out of memory before the first iteration: the weights, two numbers of AdamW for each "
            "and the averages stay there throughout, and a smaller batch makes no room for them. "
            "Keep fewer averages (training.ema, training.power_ema), use a smaller network or "
            "another device, or several processes with distributed=fsdp."
        ) from error
