"""lora-lite: PyTorch adapters as plugins. Users import it as `import lora_lite as ll`.

The public names stand in `__init__.pyi`. They are resolved on first use, so that importing this package imports neither
torch nor any plugin.
"""

from typing import Any

import lazy_loader  # pyright: ignore[reportMissingTypeStubs]

_named, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        value: Any = _named(name)
    elif name == "__version__":
        from importlib_metadata import version

        value = version("lora-lite-core")
    elif name.endswith("Config") and name[0].isupper():
        from .discovery.registry import config_class

        return config_class(name)  # not kept: a variant may be registered anew
    else:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from .discovery.listing import config_names, list_variants

    return sorted({*__all__, "__version__", *config_names(list_variants())})
