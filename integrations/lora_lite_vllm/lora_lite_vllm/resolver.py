"""The plugin of vLLM: `vllm serve BASE --enable-lora` with LORA_LITE_ADAPTERS set serves adapter files by name."""

from __future__ import annotations

import logging
from typing import Any

from .exports import Settings, exported

# below vLLM's own logger, so that its settings hold
log = logging.getLogger("vllm.lora_lite")


def register() -> None:
    """Called by vLLM in each of its processes, as an entry point of the group `vllm.general_plugins`. Does nothing
    where LORA_LITE_ADAPTERS is not set. Raises ConfigError for settings that make no sense."""
    settings = Settings.from_environment()
    if settings is None:
        return
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

    class AdapterResolver(LoRAResolver):  # pyright: ignore[reportUntypedBaseClass]
        """NAME.safetensors of the folder, exported as a LoRA when a request names it."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            try:
                folder = await exported(settings, base_model_name, lora_name)
            except Exception as error:
                log.warning("%s", error)
                raise
            if folder is None:
                return None
            log.info("adapter '%s' is served from %s", lora_name, folder)
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))  # vLLM numbers it itself

    if "lora-lite" not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver("lora-lite", AdapterResolver())
