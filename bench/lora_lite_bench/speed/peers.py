"""The same methods in Hugging Face's peft package, to measure against. peft is imported only when asked for."""

from __future__ import annotations

from typing import Any

import lora_lite_core as ll


def peft_config(cfg: ll.AdapterConfig, names: list[str]) -> Any:
    """peft's config of the method that `cfg` sets, on the modules called `names`; None where peft has no such method.

    EVA's step is LoRA's there too; its start, from data, is timed apart. DeLoRA with frozen copies is compared with the
    one form that peft has.
    """
    import peft

    make: dict[str, Any] = {
        "lora": lambda c: peft.LoraConfig(**_lora(c)),
        "eva": lambda c: peft.LoraConfig(**_lora(c)),
        "pissa": lambda c: peft.LoraConfig(**_lora(c), init_lora_weights="pissa"),
        "dora": lambda c: peft.LoraConfig(**_lora(c), use_dora=True),
        "delora": lambda c: peft.DeloraConfig(r=c.r, delora_lambda=c.lambda0),
        "hra": lambda c: peft.HRAConfig(r=c.r),
        "oft": lambda c: peft.OFTConfig(oft_block_size=c.block_size),
        "road": lambda c: peft.RoadConfig(variant=f"road_{c.mode}", group_size=c.group_size or 64),
        "ia3": lambda c: peft.IA3Config(feedforward_modules=[]),
        "ia3_ff": lambda c: peft.IA3Config(feedforward_modules=names),
    }
    if cfg.variant not in make:
        return None
    config = make[cfg.variant](cfg)
    config.target_modules = set(names)
    return config


def _lora(cfg: Any) -> dict[str, Any]:
    return {"r": cfg.r, "lora_alpha": cfg.r if cfg.alpha is None else cfg.alpha}
