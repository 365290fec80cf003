"""The training loop: warm-up and cosine, clipping, averaged weights, checkpoints that resume exactly."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Loss = Callable[[int, float, torch.Generator], Tensor]
"""(step, progress in 0..1, generator) -> scalar loss. All randomness comes from the generator."""


LONGEST = 30.0
"""Seconds that one step counts at most: a process that was stopped for a while did not train meanwhile."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast. Progress is counted in steps where `steps` is given, else in seconds trained."""

    rate: float
    steps: int | None = None
    minutes: float = 60.0
    warmup: int = 100
    average: float = 0.998
    """Decay of the averaged weights; the average starts as the mean of all weights so far."""
    clip: float = 1.0
    seed: int = 0
    save_every: float = 120.0
    """Seconds between checkpoints."""

    @staticmethod
    def of(args: argparse.Namespace, **more) -> Plan:
        """The plan that a script's flags describe."""
        return Plan(rate=args.rate, steps=args.steps, minutes=args.minutes, seed=args.seed, **more)

    def progress(self, step: int, seconds: float) -> float:
        """Part of the training that is done, 0..1."""
        return min(1.0, step / self.steps if self.steps else seconds / (60 * self.minutes))

    def rate_at(self, step: int, progress: float) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        return self.rate * min(1.0, (step + 1) / self.warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


class Trainer:
    """One module, its optimiser, its averaged weights and its checkpoint file."""

    def __init__(self, module: nn.Module, plan: Plan, path: Path) -> None:
        self.module, self.plan, self.path = module, plan, path
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=plan.rate, betas=(0.9, 0.98), weight_decay=1e-4, foreach=True
        )
        self.average = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.step, self.seconds = 0, 0.0

    def save(self) -> None:
        """Write the checkpoint; a kill in the middle leaves the previous one whole."""
        state = {
            "module": self.module.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def load(self) -> None:
        """Go back to the checkpoint."""
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = self.parameters[0].device
        self.average = {k: v.to(device) for k, v in state["average"].items()}
        self.step, self.seconds = state["step"], state["seconds"]

    def _average(self) -> None:
        keep = min(self.plan.average, self.step / (self.step + 10))
        names, values = zip(*self.module.state_dict().items(), strict=True)
        old = [self.average[name] for name in names]
        floating = [i for i, v in enumerate(values) if v.is_floating_point()]
        torch._foreach_lerp_([old[i] for i in floating], [values[i].detach() for i in floating], 1 - keep)

    def run(self, loss_of: Loss, until: int | None = None, report_every: float = 20.0) -> None:
        """Train to the end of the plan, or until the step `until`; saves now and then, and at the end."""
        clock, saved, reported, sums = time.monotonic(), self.seconds, self.seconds, []
        while (progress := self.plan.progress(self.step, self.seconds)) < 1 and self.step != until:
            # A stream per step, so that a resumed run draws what an uninterrupted one would have drawn.
            generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.step)
            rate = self.plan.rate_at(self.step, progress)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(self.step, progress, generator)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, self.plan.clip)
            self.optimizer.step()
            self.step += 1
            self._average()
            sums.append(loss.detach())
            now = time.monotonic()
            self.seconds, clock = self.seconds + min(now - clock, LONGEST), now
            if self.seconds - reported > report_every:
                mean = torch.stack(sums).mean().item()
                pace = (self.seconds - reported) / len(sums)
                print(f"step {self.step:6d}  {progress:6.1%}  loss {mean:.5f}  {pace:.3f} s/step", flush=True)
                reported, sums = self.seconds, []
            if self.seconds - saved > self.plan.save_every:
                self.save()
                saved = self.seconds
        self.save()


def averaged(path: Path) -> dict[str, Tensor]:
    """The averaged weights in a checkpoint."""
    return torch.load(path, map_location="cpu", weights_only=True)["average"]
