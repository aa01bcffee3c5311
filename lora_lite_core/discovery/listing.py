"""The listing of variants: its rows, its table, and what can be read of a plugin without importing it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import overload

from ..contract.text import table

HEADS = ("variant", "package", "state", "summary")


@dataclass(frozen=True)
class VariantInfo:
    """One row of the listing. `state` is "ok", "broken", "blocked" or "claimed twice"; `detail` says why."""

    name: str
    distribution: str
    version: str
    summary: str
    state: str
    detail: str = ""
    module: str = ""
    config: str = ""


class VariantList(Sequence[VariantInfo]):
    """Variants, as a sequence of VariantInfo that prints as a table; `"pissa" in list_variants()` works too."""

    def __init__(self, items: Iterable[VariantInfo]) -> None:
        self._items = list(items)

    @overload
    def __getitem__(self, index: int) -> VariantInfo: ...
    @overload
    def __getitem__(self, index: slice) -> VariantList: ...
    def __getitem__(self, index: int | slice) -> VariantInfo | VariantList:
        return VariantList(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return any(item in (info, info.name) for info in self._items)

    def __repr__(self) -> str:
        if not self._items:
            return "no variants match; `lora-lite variants` lists all, `pip install lora-lite` brings the built-in ones"
        return "\n".join([table(HEADS, self._rows()), *self._details()])

    def _repr_html_(self) -> str:
        """The same table for notebooks."""
        if not self._items:
            return f"<p>{html.escape(repr(self))}</p>"
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in HEADS)
        rows = (
            "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) for row in self._rows()
        )
        body = "".join(f"<tr>{cells}</tr>" for cells in rows)
        notes = "".join(f"<p>{html.escape(detail)}</p>" for detail in self._details())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [(i.name, f"{i.distribution} {i.version}".strip(), i.state, i.summary) for i in self._items]

    def _details(self) -> list[str]:
        return [f"{i.name}: {i.detail}" for i in self._items if i.detail]

    def to_dicts(self) -> list[dict[str, str]]:
        return [asdict(info) for info in self._items]


def config_names(infos: Iterable[VariantInfo]) -> Iterator[str]:
    """The config classes of the listing, for `dir(lora_lite)`."""
    return (info.config for info in infos if info.state == "ok" and info.config.endswith("Config"))
