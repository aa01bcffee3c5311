"""How AdaMSS is written in PEFT's directories, and read. They do not say which output is in which group: PEFT finds the
groups anew at load, by scikit-learn, from random projections that depend on the kind of device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lite_core import ConfigError, MergeError

from ._allocation import in_force
from ._subspaces import in_order, with_bias

Pair = tuple[dict[str, Any], dict[str, Tensor]]
NAMES = {"begin": "init_warmup", "end": "final_warmup", "interval": "mask_interval", "beta1": "asa_importance_beta"}
NAMES |= {"beta2": "asa_uncertainty_beta", "power": "asa_schedule_exponent"}
STATE = 123456789  # of PEFT's k-means


def groups_of_peft(layer: nn.Module, dims: int, count: int, seed: int = 0) -> Tensor:
    """PEFT's number of the group of each output."""
    try:
        from sklearn.cluster import KMeans  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise ConfigError("PEFT finds the groups of AdaMSS by scikit-learn: pip install scikit-learn") from None
    joined = with_bias(layer).float()
    with torch.random.fork_rng(devices=[joined.device] if joined.is_cuda else []):
        torch.manual_seed(seed)
        U = torch.svd_lowrank(joined, q=dims, niter=2)[0]
    fields: dict[str, Any] = {"init": "random", "n_init": 1, "max_iter": 10, "random_state": STATE}
    means = KMeans(min(count, len(U)), **fields)
    return torch.from_numpy(means.fit_predict(U.detach().cpu().numpy())).long()


def to_peft(params: dict[str, Tensor], cfg: Any, layer: nn.Module) -> Pair:
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise MergeError(f"PEFT's AdaMSS takes linear layers with a dense weight, not this {type(layer).__name__}")
    V, groups = params["lora_V"], params["lora_c"].cpu()
    theirs = groups_of_peft(layer, len(V), cfg.subspaces)
    if not torch.equal(in_order(theirs), in_order(groups)):
        raise MergeError(
            "PEFT would put outputs of this layer into other groups; attach with AdaMSSConfig(like_peft=True) to train "
            "in its groups, or merge(model) writes the change into the weights"
        )
    fields = {"peft_type": "ADAMSS", "r": cfg.dims, "num_subspaces": cfg.subspaces, "subspace_rank": cfg.r}
    fields |= {"use_asa": cfg.target is not None, "asa_target_subspaces": cfg.target or 50, "random_seed": 0}
    fields |= {"use_dynamic_rank": cfg.threshold > 0, "svd_threshold": cfg.threshold or 0.1}
    fields |= {theirs: getattr(cfg, ours) for ours, theirs in NAMES.items()} | {"init_weights": "orthogonal"}
    newB = torch.cat([V, params["lora_v"][:, None]], 1) if "lora_v" in params else V
    tensors = {"adamss_newB": newB}
    A, B = (tensor.cpu() for tensor in in_force(params))
    for number in range(int(theirs.max()) + 1):
        outputs = theirs == number
        rows = A.view(-1, cfg.r, A.shape[1])[groups[outputs][0]]
        alive = rows.ne(0).any(1)
        tensors[f"adamss_A.{number}"], tensors[f"adamss_B.{number}"] = rows[alive], B[outputs][:, alive]
    return fields, tensors


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor], layer: nn.Module) -> Pair | None:
    if config["peft_type"] != "ADAMSS":
        return None
    newB = tensors["adamss_newB"]
    dims, d_in = len(newB), newB.shape[1] - (getattr(layer, "bias", None) is not None)
    theirs = groups_of_peft(layer, dims, config["num_subspaces"], config.get("random_seed", 0))
    groups, r = in_order(theirs), config["subspace_rank"]
    if not 1 <= r <= dims:
        raise ConfigError(f"subspace_rank={r} is not between 1 and the {dims} dimensions of adamss_newB")
    A, B = newB.new_zeros(int(groups.max()) + 1, r, dims), newB.new_zeros(len(groups), r)
    for number in range(len(A)):
        outputs, rows, columns = theirs == number, tensors[f"adamss_A.{number}"], tensors[f"adamss_B.{number}"]
        if len(columns) != int(outputs.sum()):
            raise ConfigError(
                f"adamss_B.{number} is of {len(columns)} outputs, and PEFT would put {int(outputs.sum())} of this "
                "layer into that group: the adapter was made on another weight, or on another kind of device"
            )
        A[groups[outputs][0], : len(rows)], B[outputs, : len(rows)] = rows, columns
    fields = {ours: config[theirs] for ours, theirs in NAMES.items()}
    fields |= {"r": r, "dims": config["r"], "subspaces": config["num_subspaces"], "like_peft": True}
    target, share = config.get("asa_target_subspaces"), config.get("svd_threshold")
    fields |= {"target": target if config.get("use_asa") else None}
    fields |= {"threshold": share if config.get("use_dynamic_rank") else 0.0}
    values = {"lora_V": newB[:, :d_in], "lora_A": A.flatten(0, 1), "lora_B": B, "lora_c": groups}
    if d_in < newB.shape[1]:
        values["lora_v"] = newB[:, d_in]
    if fields["target"] is not None:
        values["lora_m"] = torch.ones(len(A))
        for name in ("lora_A", "lora_B"):
            values |= {f"{name}_{of}": torch.zeros_like(values[name]) for of in ("mean", "unsure", "kept")}
    return fields, values
