"""Who may provide a variant or a command: environment switches, names that have a home, names that several claim."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ..contract.text import normal
from .entry_points import Entry

ALLOW, BLOCK = "LORA_LITE_PLUGINS", "LORA_LITE_BLOCK"  # environment switches: names of variants and of packages
# For the "pip install …" hint when a first-party package is missing, and for what LORA_LITE_PLUGINS=NAME means.
_PACKAGES = {
    "lora-lite-lora": "adalora alora corda dylora gralora kasa lora lora_fa lora_ga "
    "lora_sb melora miss molora mora moslora olora poly qalora sora trainable_tokens",
    "lora-lite-svd": "adamss antipasto eva lora_xs osf pissa spectral ssvd svf svft",
    "lora-lite-ortho": "bitfit boft delora dora hra ia3 ia3_ff ln_tuning oft psoft red road ssf",
    "lora-lite-antipasto": "antipasto_ablate antipasto_gain antipasto_mix",
    "lora-lite-shared": "frod lily pvera randlora tied_lora tinylora uni_lora vb_lora vera",
    "lora-lite-tensor": "compacter krona loha lokr loretta quanta",
    "lora-lite-sparse": "c3a fish_mask fourierft shira supertuning waveft",
    "lora-lite-weight": "deft glora hira peanut peqa",
    "lora-lite-repr": "direft houlsby loreft parallel",
}
FIRST_PARTY = {name: package for package, names in _PACKAGES.items() for name in names.split()}
COMMANDS = {"bench": "lora-lite-bench", "report": "lora-lite-bench", "speed": "lora-lite-bench"}


def state_of(entry: Entry, entries: Sequence[Entry], homes: Mapping[str, str] = FIRST_PARTY) -> tuple[str, str]:
    """ "ok", "blocked", "broken" or "claimed twice", and why. What is blocked or broken claims no name.

    entries  all of the group
    homes    which of this project's packages a name belongs to: FIRST_PARTY for variants, COMMANDS for commands
    """
    if switch := switched_off(entry, homes):
        return "blocked", switch
    if entry.problem:
        return "broken", entry.problem
    rivals = [one for one in entries if one.name == entry.name and not one.problem and not switched_off(one, homes)]
    meant = _meant(entry.name, rivals, homes)
    if entry not in meant:
        return "blocked", f"{ALLOW}={os.environ[ALLOW]}, which means the one of {meant[0].package.name}"
    return ("claimed twice", _claimed_twice(entry.name, meant, homes)) if len(meant) > 1 else ("ok", "")


def switched_off(entry: Entry, homes: Mapping[str, str] = FIRST_PARTY) -> str:
    """The environment switch that keeps it out, or "".

    To block, names that pip takes for the same are the same. To allow, a variant's name counts as it is written, and
    one that has a home is no package's name. This project's own commands need not be allowed.
    """
    package = normal(entry.package.name)
    if (blocked := _given(BLOCK)) is not None and {normal(entry.name), package} & set(map(normal, blocked)):
        return f"{BLOCK}={os.environ[BLOCK]}"
    if (allowed := _given(ALLOW)) is not None:
        at_home = homes is COMMANDS and homes.get(entry.name) == package
        if not (at_home or entry.name in allowed or package in _packages(allowed)):
            return f"{ALLOW}={os.environ[ALLOW]}"
    return ""


def _meant(name: str, rivals: list[Entry], homes: Mapping[str, str]) -> list[Entry]:
    """Where the allow list names what several provide: this project's own, else that of a package that it names, too.
    So nobody is locked out by a package that claims a name."""
    allowed = _given(ALLOW)
    if allowed is None or name not in allowed:
        return rivals
    own = [entry for entry in rivals if normal(entry.package.name) == homes.get(name)]
    return own or [entry for entry in rivals if normal(entry.package.name) in _packages(allowed)] or rivals


def _given(switch: str) -> list[str] | None:
    """The names in an environment switch; None where it is not set."""
    value = os.environ.get(switch)
    return None if value is None else [part for part in map(str.strip, value.split(",")) if part]


def _packages(allowed: Sequence[str]) -> set[str]:
    return {normal(name) for name in allowed if name not in FIRST_PARTY}


def _claimed_twice(name: str, rivals: Sequence[Entry], homes: Mapping[str, str]) -> str:
    owners = " and by ".join(f"{entry.package.name} {entry.package.version}" for entry in rivals)
    kept = next((e for e in rivals if normal(e.package.name) == homes.get(name)), rivals[0]).package.name
    others = [entry.package.name for entry in rivals if entry.package.name != kept]
    blocked = ",".join([*(_given(BLOCK) or ()), *others])
    return (
        f"{'variant' if homes is FIRST_PARTY else 'command'} '{name}' is claimed by {owners}; uninstall one of them, "
        f"or set {BLOCK}={blocked} (or {ALLOW}={kept}, which allows that package alone)"
    )
