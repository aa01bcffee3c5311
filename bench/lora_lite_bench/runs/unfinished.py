"""States of unfinished runs: a run that was killed goes on from the last one that was kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import lora_lite_core as ll

from ..machine.processes import processes

if TYPE_CHECKING:
    from .training import Training

STATE, ADAPTER = "state.pt", "adapter.safetensors"


class State:
    """Of one training, in `place`: the last state in a folder "step-N", which appears whole or not at all.

    It holds the adapter's file, or the base's own tensors that are trained, and of the optimizer, the schedule and the
    random numbers what makes the next step the one that it would have been. Batches are found again by their number.
    """

    def __init__(self, training: Training, place: Path | None) -> None:
        self.training, self.place = training, place

    def keep(self) -> None:
        """Write the state, and remove the one before. Only the first of several processes writes."""
        if self.place is None or not processes().main:
            return
        this = self.training
        self.place.mkdir(parents=True, exist_ok=True)
        part, whole = self.place / "part", self.place / f"step-{len(this.losses)}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        state: dict[str, Any] = {
            "losses": this.losses,
            "seconds": this.seconds,
            "at_once": this.at_once.size,
            "optimizer": this.optimizer.state_dict(),
            "scheduler": this.scheduler.state_dict(),
            "random": _random(),
        }
        if this.adapted:
            ll.save(this.model, part / ADAPTER)
        else:
            state["tensors"] = [parameter.detach() for parameter in this.parameters]
        torch.save(state, part / STATE)
        older = self._kept()
        part.rename(whole)
        for folder in older:
            shutil.rmtree(folder, ignore_errors=True)

    def restore(self) -> None:
        """Give the training the last state that was kept, if there is one."""
        kept = self._kept()
        if not kept:
            return
        this, folder = self.training, kept[-1]
        state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        if this.adapted:
            ll.load_into(this.model, folder / ADAPTER)
        else:
            with torch.no_grad():
                for parameter, tensor in zip(this.parameters, state["tensors"], strict=True):
                    parameter.copy_(tensor)
        this.optimizer.load_state_dict(state["optimizer"])
        this.scheduler.load_state_dict(state["scheduler"])
        this.losses, this.seconds = list(state["losses"]), float(state["seconds"])
        this.at_once.size = int(state["at_once"])
        torch.set_rng_state(state["random"][0])
        if len(state["random"]) > 1 and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random"][1])

    def _kept(self) -> list[Path]:
        """Folders of whole states, the last one last."""
        found = self.place.glob("step-*") if self.place is not None else ()
        return sorted(found, key=lambda folder: int(folder.name.partition("-")[2]))


def _random() -> list[torch.Tensor]:
    """The states of torch's random numbers: of the CPU and, where there is one, of this process's GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
