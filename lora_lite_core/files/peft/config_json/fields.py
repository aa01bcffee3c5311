"""The fields of PEFT's adapter_config.json: which are read, which say nothing of the adapter, which are refused.

Every field is one of these; a field that nobody has read and that is not off is an error, whoever made it up. Of the
methods' own fields a variant's `from_peft` reads what it needs.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from ....contract.errors import AdapterFileError
from ....contract.text import plain

if TYPE_CHECKING:
    from _collections_abc import dict_items, dict_values

CONFIG = "adapter_config.json"
BEGAN = "init_lora_weights"
# What a layer's own value of a field is looked up in, by patterns.
PER_LAYER = {
    "r": "rank_pattern", "lora_alpha": "alpha_pattern", "alpha": "alpha_pattern", "delora_lambda": "lambda_pattern",
}  # fmt: skip
SELECTING = (
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save",
)  # fmt: skip

IGNORED = {
    "task_type": "what the model is for",
    "auto_mapping": "the base model's class",
    "base_model_name_or_path": "the base model's name; whether this is that model cannot be told from a name",
    "revision": "the base model's revision",
    "peft_version": "what wrote the folder",
    "inference_mode": "whether PEFT trains it on; here `trainable` says so",
    "ensure_weight_tying": "ties what is trained of tied modules: in the file it is there, for each of them or for one",
    "runtime_config": "how PEFT runs",
    "runtime_offload_base_weight": "how PEFT runs",
    "fan_in_fan_out": "whether the base's weights are transposed; each layer tells it itself, for PEFT, too",
    "init_weights": "where training began",
    "init_ia3_weights": "where training began",
    "eva_config": "where training began",
    "corda_config": "where training began",
    "loftq_config": "where training began",
    "lora_ga_config": "where training began",
    "megatron_core": "only with megatron_config",
    "qalora_group_size": "only with use_qalora, whose variant reads it",
}
IN_PEFT = (
    "with PEFT: peft.save_as_lora(folder, model, rank=…) writes it as a LoRA, model.merge_and_unload() into the weights"
)
REFUSED = {
    "layer_replication": "builds another model of the base's layers",
    "megatron_config": "is for layers of Megatron",
    "arrow_config": "chooses between adapters at every token",
}
# What PEFT does in training and nobody here does: the outputs are the same.
TRAINED = {
    "use_bdlora": "keeps what is outside of the blocks at zero in training",
    "monteclora_config": "draws lora_A anew at each step of training, with a loss of its own",
    "velora_config": "trains lora_A with gradients of compressed inputs",
}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict = 3, 8, 8

_Check = Callable[[Any], bool]
_V = TypeVar("_V")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _or_null(kind: tuple[str, _Check]) -> tuple[str, _Check]:
    what, fits = kind
    return what, lambda v: v is None or fits(v)


def _flags(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, bool) for one in value)


def _numbers(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_number, value.values())))


TEXT: tuple[str, _Check] = ("a text", lambda v: isinstance(v, str))
WORD: tuple[str, _Check] = ("a text", lambda v: v is None or isinstance(v, str))
FLAG: tuple[str, _Check] = ("true or false", lambda v: v is None or isinstance(v, bool))
NUMBER: tuple[str, _Check] = ("a number", _number)
WHOLE: tuple[str, _Check] = ("a whole number from 0", _whole)
NAMES: tuple[str, _Check] = ("a list of names or a pattern", lambda v: v is None or isinstance(v, str) or _texts(v))
LIST: tuple[str, _Check] = ("a list of names", lambda v: v is None or _texts(v))
PLACES: tuple[str, _Check] = (
    "a block's number or a list of them",
    lambda v: v is None or _whole(v) or (isinstance(v, list) and all(map(_whole, v))),
)
IDS: tuple[str, _Check] = ("a list of token ids", _ids)
SOME: tuple[str, _Check] = ("a list of token ids", lambda v: v is None or _ids(v))
TOKENS: tuple[str, _Check] = (
    "a list of token ids, or one for each embedding's name",
    lambda v: v is None or _ids(v) or (isinstance(v, dict) and all(map(_ids, v.values()))),
)
TABLE: tuple[str, _Check] = ("numbers by pattern", _numbers)
WEIGHTS: tuple[str, _Check] = ("numbers by name", _numbers)
MASKS: tuple[str, _Check] = (
    "a list of true and false for each module",
    lambda v: v is None or (isinstance(v, dict) and all(_flags(one) for one in v.values())),
)
SHARE: tuple[str, _Check] = ("a number from 0 to 1", lambda v: v is None or (_number(v) and 0 <= v <= 1))
START: tuple[str, _Check] = ("true, false or a name", lambda v: v is None or isinstance(v, (bool, str)))

KINDS = {
    "peft_type": TEXT, "target_modules": NAMES, "exclude_modules": NAMES, "feedforward_modules": NAMES,
    "modules_to_save": LIST, "target_parameters": LIST, "layers_to_transform": PLACES, "layers_pattern": NAMES,
    "rank_pattern": TABLE, "alpha_pattern": TABLE, "lambda_pattern": TABLE, "init_lora_weights": START,
    "token_indices": IDS, "trainable_token_indices": TOKENS, "alora_invocation_tokens": SOME,
    "r": WHOLE, "lora_alpha": NUMBER, "alpha": NUMBER, "bias": WORD, "use_rslora": FLAG, "use_dora": FLAG,
    "use_qalora": FLAG, "lora_bias": FLAG, "apply_GS": FLAG, "oft_block_size": WHOLE, "coft": FLAG, "block_share": FLAG,
    "use_cayley_neumann": FLAG, "variant": TEXT, "group_size": WHOLE, "delora_lambda": NUMBER,
    "kasa_config": WEIGHTS,
}  # fmt: skip
# Where a peft_type means something else by a field, or lets it be null: no LoRA beside the entries; the rank.
OF_TYPE: dict[str, dict[str, tuple[str, _Check]]] = {
    "ADALORA": {"rank_pattern": MASKS},
    "SUPERTUNING": {"r": _or_null(WHOLE), "lora_alpha": _or_null(NUMBER)},
    "DEFT": {"alpha": _or_null(NUMBER)},
}


class Tracked(dict[str, _V]):
    """A dict that remembers which of its values were read."""

    def __init__(self, items: Mapping[str, _V]) -> None:
        super().__init__(items)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> _V:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.read.add(key)
        return super().pop(key, *default)

    def items(self) -> dict_items[str, _V]:
        self.read.update(self)
        return super().items()

    def values(self) -> dict_values[str, _V]:
        self.read.update(self)
        return super().values()


def check_fields(config: Mapping[str, Any]) -> None:
    """Raise AdapterFileError for what no variant could read."""
    kinds = {**KINDS, **OF_TYPE.get(str(config.get("peft_type")), {})}
    for name, value in config.items():
        what, fits = SHARE if name.endswith("dropout") else kinds.get(name, ("", lambda _: True))
        if not fits(value):
            raise AdapterFileError(f"{named(name, value)}: it is {what}")
        if name in REFUSED and not off(value):
            raise AdapterFileError(f"{named(name, value)} {REFUSED[name]}; no variant here computes that; {IN_PEFT}")


def check_all_read(config: Tracked[Any], variant: str, trainable: bool) -> None:
    """Raise AdapterFileError when a field that is on was read by nobody; dropout matters in training only."""
    known = {
        *IGNORED,
        *SELECTING,
        "peft_type",
        "$tied",
        BEGAN,  # see starts.py
        *config.read,
    }
    known |= {pattern for field, pattern in PER_LAYER.items() if field in config.read}
    for name in config:
        value = dict.__getitem__(config, name)
        if trainable and name in TRAINED and not off(value):
            raise AdapterFileError(
                f"{named(name, value)} {TRAINED[name]}; type import_peft(…, trainable=False) to run the adapter; "
                f"what ll.save writes of that trains on as any '{variant}'"
            )
        if name in known or off(value):
            continue
        if name.endswith("dropout"):
            if trainable:
                raise AdapterFileError(
                    f"{named(name, value)}: variant '{variant}' has no dropout; type import_peft(…, trainable=False) "
                    f"to run the adapter, which dropout does not change, or set it to 0 in {CONFIG} to train on without"
                )
        else:
            raise AdapterFileError(
                f"{named(name, value)} is not what variant '{variant}' reads; it may change what the adapter computes; "
                f"{IN_PEFT}"
            )


def off(value: object) -> bool:
    """Whether a value is how PEFT's configs write that something is not used."""
    return not value or value == "none"


def named(name: str, value: object) -> str:
    return f"{plain(name, 100)}={shown(value)} in {CONFIG}"


def shown(value: object) -> str:
    """The value as Python writes it, cut where it gets long or deep."""
    return _SHORT.repr(value)


def first_of(names: Collection[str], most: int = 4) -> str:
    """Some of these names for people, comma separated."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return (", ".join(plain(name, 100) for name in islice(names, most)) or "none") + more
