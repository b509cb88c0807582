"""What training changes: the model, its averages, the optimiser, and how much was passed over."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from experiment.averages import Average, Profile
from experiment.faults import Faults
from experiment.processes import DDP, Processes
from experiment.speed import Speed
from score_models import Objective, ScoreModel


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
        contiguous = self.processes.parted
        # first of all: averages lie in memory as the weights do
        quick = BatchLoss(self.speed.of_model(model, self.device, contiguous), objective)
        if self.processes.parted:  # whole copies would fill what the parts are to make room on
            self.trained.cpu()
        self.averages = [Average(profile, self.trained) for profile in profiles]
        self.trained.to(self.device)
        self.loss = self.processes.spread(quick, self.device)
        self.weights = self.processes.weights(self.trained)
        self._keepers = [module for module in self.trained.modules() if module._buffers]
        self.names = [name for name, _ in self.trained.named_parameters()]
        for average in self.averages:
            average.hold(self._parts(average.weights))
        self._moving = [n for n, weight in enumerate(self.weights) if weight.requires_grad]
        moving = [self.weights[n] for n in self._moving]
        self.optimizer = torch.optim.AdamW(moving, fused=True, **adam)
        self.scale = self.speed.loss_scale(self.device)
        self.faults = Faults(self.device)
        self.iteration = 0

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
        average = self.averages[index]
        if average.whole:
            return average.module
        module = copy.deepcopy(average.module).to(self.device)
        with torch.no_grad():
            for own, part in zip(module.parameters(), self._wholes(average.weights), strict=True):
                own.copy_(part)
            for own, new in zip(module.buffers(), self.trained.buffers(), strict=True):
                own.copy_(new)
        return module

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
        weights, buffers = [*self.weights], self._buffers()
        for average in self.averages:
            average.update(weights, buffers, self.iteration)
        return norm, skip

    def _buffers(self) -> list[Tensor]:
        """Of all that is trained, as they are now, without a walk through modules that have
        none."""
        found = (b for module in self._keepers for b in module._buffers.values() if b is not None)
        return list(dict.fromkeys(found))  # each once, as the module itself lists them

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on to the bit; batches and noise follow from (seed, iteration).

        All processes have to ask; nothing in it depends on their number.
        """
        trained = self._stored(self.trained, self.weights)
        averages = [self._stored_average(average) for average in self.averages]
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

        All processes have to ask.
        """
        return {
            average.profile.name: self._stored_average(average)
            for average in self.averages
            if average.profile.combines
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; averages that it lacks begin from its weights."""
        self._restore(self.trained, self.weights, state["model"], state.get("objective", {}))
        stored, nearest = state.get("averages", {}), state["ema"]
        for average in self.averages:
            others = {"model": nearest, "objective": state.get("objective", {})}
            parts = stored.get(average.profile.name, others)
            self._restore(average.module, average.weights, parts["model"], parts["objective"])
            nearest = state["model"]
        self._load_optimizer(state["optimizer"])
        self.scale.load_state_dict(state.get("loss_scale", {"start": 0.0}))
        self.iteration = int(state["iteration"])
        self.faults = Faults(self.device, self.faults.allowed, int(state["skipped"]))

    def _parts(self, wholes: list[Tensor]) -> list[Tensor]:
        likes = self.trained.parameters()
        return [self.processes.part(w, like) for w, like in zip(wholes, likes, strict=True)]

    def _wholes(self, parts: list[Tensor]) -> list[Tensor]:
        likes = self.trained.parameters()
        return [self.processes.whole(p, like) for p, like in zip(parts, likes, strict=True)]

    def _stored_average(self, average: Average) -> dict[str, dict[str, Tensor]]:
        return self._stored(average.module if average.whole else self.trained, average.weights)

    def _stored(self, module: BatchLoss, parts: list[Tensor]) -> dict[str, dict[str, Tensor]]:
        """All tensors of a module by room: those of ``model`` and of ``objective``."""
        tensors = dict(module.state_dict())
        wholes = self._wholes([part.detach() for part in parts])
        tensors.update(zip(self.names, wholes, strict=True))
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
        self,
        module: BatchLoss,
        parts: list[Tensor],
        model: Mapping[str, Tensor],
        objective: Mapping[str, Tensor],
    ) -> None:
        tensors = {f"model.{k}": v for k, v in model.items()}
        tensors |= {f"objective.{k}": v for k, v in objective.items()}
        wholes = [tensors[name].to(self.device) for name in self.names]
        for own, part in zip(parts, self._parts(wholes), strict=True):
            own.copy_(part)
        for name, buffer in module.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])

    def _likes(self) -> list[nn.Parameter]:
        """The parameters that the optimiser changes, as the modules hold them."""
        parameters = list(self.trained.parameters())
        return [parameters[n] for n in self._moving]

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimiser's own, with the parts of all processes put together."""
        state, likes = self.optimizer.state_dict(), self._likes()
        state["state"] = {
            number: {name: self.processes.whole(v, likes[number]) for name, v in values.items()}
            for number, values in state["state"].items()
        }
        return state

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        likes = self._likes()

        def placed(values: Tensor, number: int) -> Tensor:
            """In memory as the weight is: the optimiser goes through both number by number, and
            the run may go on in another layout."""
            part, weight = self.processes.part(values, likes[number]), self._moving[number]
            if part.shape != self.weights[weight].shape:  # its count of steps
                return part.clone()
            return torch.empty_like(self.weights[weight]).copy_(part)

        parts = {
            number: {name: placed(v, number) for name, v in values.items()}
            for number, values in state["state"].items()
        }
        own = self.optimizer.state_dict()["param_groups"]  # the numbers of this run's settings
        self.optimizer.load_state_dict({"state": parts, "param_groups": own})
