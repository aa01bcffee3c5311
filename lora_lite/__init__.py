"""What users import: `import lora_lite as ll`. Every name is the one of lora_lite_core, resolved on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lora_lite_core

if TYPE_CHECKING:
    from lora_lite_core import *  # noqa: F403

__all__ = lora_lite_core.__all__  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    try:
        return getattr(lora_lite_core, name)
    except AttributeError as error:
        if str(error).startswith("module 'lora_lite_core'"):
            raise AttributeError(f"module 'lora_lite' has no attribute '{name}'") from None
        raise


def __dir__() -> list[str]:
    return dir(lora_lite_core)
