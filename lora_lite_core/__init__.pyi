"""The public names of lora_lite_core: one table, for type checkers and (through lazy_loader) at run time."""

import typing

from .attached.adapter import (
    Adapter as Adapter,
)
from .attached.adapter import (
    adapters as adapters,
)
from .attached.adapter import (
    attach as attach,
)
from .attached.adapter import (
    detach as detach,
)
from .attached.model_hooks.calls import context as context
from .attached.switching.choosing import activate as activate
from .attached.switching.choosing import active as active
from .attached.switching.choosing import disabled as disabled
from .attached.switching.choosing import routed as routed
from .attached.switching.choosing import set_strength as set_strength
from .attached.switching.choosing import strength as strength
from .contract.config import AdapterConfig as AdapterConfig
from .contract.config import LowRankConfig as LowRankConfig
from .contract.config import RankConfig as RankConfig
from .contract.errors import (
    AdapterFileError as AdapterFileError,
)
from .contract.errors import (
    AdapterNameError as AdapterNameError,
)
from .contract.errors import (
    AmbiguousVariant as AmbiguousVariant,
)
from .contract.errors import (
    BaseMismatch as BaseMismatch,
)
from .contract.errors import (
    BrokenPlugin as BrokenPlugin,
)
from .contract.errors import (
    CalibrationError as CalibrationError,
)
from .contract.errors import (
    ConfigError as ConfigError,
)
from .contract.errors import (
    LoraLiteError as LoraLiteError,
)
from .contract.errors import (
    MergeError as MergeError,
)
from .contract.errors import (
    MissingPlugin as MissingPlugin,
)
from .contract.errors import (
    ModelStateError as ModelStateError,
)
from .contract.errors import (
    TargetError as TargetError,
)
from .contract.errors import (
    UnknownVariant as UnknownVariant,
)
from .contract.errors import (
    UnsupportedLayer as UnsupportedLayer,
)
from .contract.hookspecs import CONTRACT_VERSION as CONTRACT_VERSION
from .contract.hookspecs import hookimpl as hookimpl
from .contract.param_spec import ParamSpec as ParamSpec
from .contract.target import Target as Target
from .discovery.listing import list_variants as list_variants
from .discovery.registry import (
    LoraLiteConfig as LoraLiteConfig,
)
from .discovery.registry import (
    get_variant as get_variant,
)
from .discovery.registry import (
    register as register,
)
from .discovery.registry import (
    unregister as unregister,
)
from .files.adapter_file import AdapterFile as AdapterFile
from .files.adapter_file import inspect as inspect
from .files.load import load as load
from .files.peft.combining import combine as combine
from .files.peft.exporting import export_peft as export_peft
from .files.peft.importing import import_peft as import_peft
from .files.peft.serving.as_lora import export_lora as export_lora
from .files.peft.serving.verifying import verify_export as verify_export
from .files.save import save as save
from .files.swap import load_into as load_into
from .layers.four_bit_packing import prepare as prepare
from .layers.kinds.embedding import project as project
from .layers.kinds.layer_kinds import layer_dtype as layer_dtype
from .layers.weight_reading import base_forward as base_forward
from .layers.weight_reading import dense_weight as dense_weight
from .layers.weight_sketch import sketch as sketch
from .toolbox.calibration import Accumulator as Accumulator
from .toolbox.calibration import Moments as Moments
from .toolbox.calibration import calibration_batches as calibration_batches
from .toolbox.calibration import collect_inputs as collect_inputs
from .toolbox.calibration import principal_directions as principal_directions
from .toolbox.calibration import run_batch as run_batch
from .toolbox.coverage import Coverage as Coverage
from .toolbox.coverage import coverage as coverage
from .toolbox.dropout import DropoutConfig as DropoutConfig
from .toolbox.dropout import dropped as dropped
from .toolbox.gradients import collect_gradients as collect_gradients
from .toolbox.optimizer_groups import param_groups as param_groups
from .toolbox.products import lowrank_delta as lowrank_delta
from .toolbox.products import sparse_delta as sparse_delta
from .toolbox.rotations import cayley_offset as cayley_offset
from .toolbox.rotations import remembered as remembered
from .toolbox.rotations import skew as skew
from .toolbox.svd import start_factors as start_factors
from .toolbox.svd import truncated_svd as truncated_svd
from .toolbox.training_steps import follow as follow
from .toolbox.training_steps import penalty as penalty
from .weights.merging import merge as merge
from .weights.merging import merged as merged
from .weights.views import reference_view as reference_view

__version__: str
__all__: list[str]

def __getattr__(name: str) -> typing.Any: ...  # pyright: ignore[reportIncompleteStub]  # `NAMEConfig` of every installed variant
def __dir__() -> list[str]: ...
