"""Who may provide a variant: environment switches, first-party names, and names that several packages claim."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..contract.text import normal
from .packages import Entry

ALLOW, BLOCK = "LORA_LITE_PLUGINS", "LORA_LITE_BLOCK"  # environment switches: names of variants and of packages
# For the "pip install …" hint when a first-party package is missing, and for what LORA_LITE_PLUGINS=NAME means.
FIRST_PARTY = {
    "lora": "lora-lite-lora",
    "antipasto": "lora-lite-svd",
    "eva": "lora-lite-svd",
    "lora_xs": "lora-lite-svd",
    "pissa": "lora-lite-svd",
    "ssvd": "lora-lite-svd",
    "delora": "lora-lite-ortho",
    "dora": "lora-lite-ortho",
    "hra": "lora-lite-ortho",
    "ia3": "lora-lite-ortho",
    "ia3_ff": "lora-lite-ortho",
    "oft": "lora-lite-ortho",
    "road": "lora-lite-ortho",
}


def state_of(entry: Entry, entries: Sequence[Entry]) -> tuple[str, str]:
    """ "ok", "blocked", "broken" or "claimed twice", and why. What is blocked or broken claims no name."""
    if switch := switched_off(entry.name, entry.package.name):
        return "blocked", switch
    if entry.problem:
        return "broken", entry.problem
    rivals = [
        one
        for one in entries
        if one.name == entry.name and not one.problem and not switched_off(one.name, one.package.name)
    ]
    meant = _meant(entry.name, rivals)
    if entry not in meant:
        return "blocked", f"{ALLOW}={os.environ[ALLOW]}, which means the one of {meant[0].package.name}"
    return ("claimed twice", _claimed_twice(entry.name, meant)) if len(meant) > 1 else ("ok", "")


def _meant(name: str, rivals: list[Entry]) -> list[Entry]:
    """Where the allow list names a variant that several provide: this project's own, else that of a package that it
    names, too. So nobody is locked out by a package that claims a name."""
    allowed = _named(ALLOW)
    if allowed is None or normal(name) not in allowed:
        return rivals
    own = [entry for entry in rivals if normal(entry.package.name) == FIRST_PARTY.get(name)]
    return own or [entry for entry in rivals if normal(entry.package.name) in allowed] or rivals


def switched_off(name: str, package: str) -> str:
    """The environment switch that keeps this variant out, or ""."""
    names = {normal(name), normal(package)}
    for switch, keeps_out in ((BLOCK, True), (ALLOW, False)):
        given = _named(switch)
        if given is not None and bool(names & given) is keeps_out:
            return f"{switch}={os.environ[switch]}"
    return ""


def _named(switch: str) -> set[str] | None:
    """The names in an environment switch as packages are compared (Lora_Lite.SVD is lora-lite-svd); None if not set."""
    value = os.environ.get(switch)
    return None if value is None else {normal(part) for part in value.split(",") if part.strip()}


def _claimed_twice(name: str, rivals: Sequence[Entry]) -> str:
    owners = " and by ".join(f"{entry.package.name} {entry.package.version}" for entry in rivals)
    kept = next((e for e in rivals if normal(e.package.name) == FIRST_PARTY.get(name)), rivals[0]).package.name
    others = [entry.package.name for entry in rivals if entry.package.name != kept]
    blocked = ",".join([*filter(None, [os.environ.get(BLOCK, "")]), *others])
    return (
        f"variant '{name}' is claimed by {owners}; uninstall one of them, or set {BLOCK}={blocked} "
        f"(or {ALLOW}={kept}, which allows that package alone)"
    )
