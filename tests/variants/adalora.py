"""AdaLoRA: LoRA in the form of an SVD, whose rank is given to the layers that need it while training goes on.

    y = W x + b + s · P diag(λ) Q x,   s = alpha / r

P (d_out, r) and Q (r, d_in) start small and random, λ (r) as zeros (the identity). Before every step each triplet is
scored by its smoothed sensitivity |w ∂w| times its uncertainty; the best `budget` of all layers stay, the λ of the others
are 0 in forward and keep their gradient. ‖PᵀP − I‖² + ‖QQᵀ − I‖² is added to the loss.

Zhang, Chen, Bukharin, He, Cheng, Chen, Zhao: AdaLoRA, 2023 (ICLR), arXiv:2303.10512, equations 3 and 8 to 12.
"""

from dataclasses import dataclass

import torch

from lora_lite_core import LowRankConfig, ParamSpec, hookimpl

BENCH = {"lr": 1e-2}
TRAINED = ("lora_P", "lora_l", "lora_Q")


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(LowRankConfig):
    variant = "adalora"
    target_r: int = 4  # the mean rank at the end
    warmup: int = 20  # steps with every triplet, then `pruning` steps of a cubic schedule
    pruning: int = 60
    beta: float = 0.85
    orthogonality: float = 0.1


Config = AdaLoRAConfig


def _small(tensor, generator):
    tensor.normal_(std=0.02, generator=generator)


@hookimpl
def param_specs(d_in, d_out, cfg):
    shapes = {"lora_P": (d_out, cfg.r), "lora_l": (cfg.r,), "lora_Q": (cfg.r, d_in)}
    specs = {name: ParamSpec(shape, "zeros" if name == "lora_l" else _small) for name, shape in shapes.items()}
    kept = {
        f"{name}_{which}": ParamSpec(shapes[name], as_buffer=True) for name in TRAINED for which in ("mean", "unsure")
    }
    return specs | kept | {"lora_mask": ParamSpec((cfg.r,), "ones", as_buffer=True, doc="1 for triplets that stay")}


@hookimpl
def forward(x, y, params, cfg):
    P, l, Q = (params[name].to(x.dtype) for name in TRAINED)
    l = l - (l * (1 - params["lora_mask"].to(x.dtype))).detach()  # the value of those that stay, the gradient of all
    return y + (x @ Q.T * (l * cfg.scale) @ P.T).to(y.dtype)


@hookimpl
def before_step(targets, cfg, step):
    scores = torch.cat([_score(target.params, cfg.beta) for target in targets])
    done = min(max(step + 1 - cfg.warmup, 0) / cfg.pruning, 1.0)
    first, last = (len(targets) * r for r in (cfg.r, cfg.target_r))
    keep = torch.zeros_like(scores)
    keep[scores.topk(last + round((first - last) * (1 - done) ** 3)).indices] = 1
    for target, mask in zip(targets, keep.split([len(target.params["lora_l"]) for target in targets]), strict=True):
        target.params["lora_mask"].copy_(mask)


def _score(params, beta):
    params["lora_l"].mul_(params["lora_mask"])  # what the last step has done to the others is undone
    total = 0
    for name in TRAINED:
        w, mean, unsure = params[name], params[f"{name}_mean"], params[f"{name}_unsure"]
        sensitivity = (w * w.grad).abs()
        mean.lerp_(sensitivity, 1 - beta)
        unsure.lerp_((sensitivity - mean).abs(), 1 - beta)
        score = mean * unsure
        total = total + (score if w.dim() == 1 else score.mean(0 if name == "lora_P" else 1))
    return total


@hookimpl
def penalty(params, cfg):
    P, Q = params["lora_P"].float(), params["lora_Q"].float()
    eye = torch.eye(len(Q), device=Q.device)
    return cfg.orthogonality * ((P.T @ P - eye).square().sum() + (Q @ Q.T - eye).square().sum())
