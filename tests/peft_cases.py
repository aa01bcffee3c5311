"""Folders of the peft package: which methods and options there are, on which small model, and what becomes of each here.

A case is a method's config on a model; where it is not opened, the text of the error is given. Measured with PEFT 0.21."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn

from .experts import MODELS
from .test_export import TOKENS, gpt2, llama

IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LORA = peft.tuners.lora.config


class Convolutions(nn.Module):
    """Of two dimensions, one of a single pixel, one of one dimension, and a linear layer."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=groups)
        self.c3, self.c4, self.fc = nn.Conv2d(8, 4, 1), nn.Conv1d(4, 6, 3, padding=1), nn.Linear(384, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c3(torch.relu(self.c2(torch.relu(self.c1(x)))))
        return self.fc(self.c4(x.flatten(2)).flatten(1))


class Pixels(nn.Module):
    """Kernels of one pixel, of two dimensions and of one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c3, self.c4 = nn.Conv2d(3, 8, 1), nn.Conv1d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c4(self.c3(x).flatten(2))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4, num_labels=3)).eval()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MODELS["mixtral"]().eval()


BASES: dict[str, Any] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "bfloat16": lambda: llama().bfloat16(),
    "float64": lambda: llama().double(),
    "gpt2": gpt2,
    "bert": bert,
    "mixtral": mixtral,
    "conv": lambda: Convolutions().eval(),
    "groups": lambda: Convolutions(2).eval(),
    "pixels": lambda: Pixels().eval(),
    "dilated": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, dilation=2), nn.Tanh(), nn.Conv2d(8, 4, 2)).eval(),
    "circular": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")).eval(),
    "uneven": lambda: nn.Sequential(nn.Conv2d(3, 8, 2, stride=(2, 1))).eval(),
}
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["value", "dense"],
    "mixtral": ["q_proj"],
    "conv": ["c1", "c2", "c3", "c4", "fc"],
    "groups": ["c2"],
    "pixels": ["c3", "c4"],
    "dilated": ["0", "2"],
    "circular": ["0"],
    "uneven": ["0"],
}
_made = functools.cache(lambda name: BASES[name]())


def base_of(name: str) -> Any:
    return copy.deepcopy(_made(name))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            return model(IMAGE)
        asked = {"task_ids": torch.zeros(len(TOKENS), dtype=torch.long)} if _is_poly(model) else {}
        return model(TOKENS % 20, **asked).logits


def _is_poly(model: Any) -> bool:
    return isinstance(model, peft.PeftModel) and model.peft_config["default"].peft_type == peft.PeftType.POLY


class Case(NamedTuple):
    base: str
    method: str
    fields: dict[str, Any]
    refused: str = ""
    size: float = 0.05  # of the noise on what is trained

    def config(self) -> Any:
        default = (
            {}
            if self.method == "LNTuning"
            else {"target_modules": TARGETS.get(self.base, ["q_proj", "gate_proj", "down_proj"])}
        )
        return getattr(peft, f"{self.method}Config")(**{**default, **self.fields})


# What a method needs on models this small, how far its tensors are moved, and its options: alone, or with the model, or
# the error that they end in.
METHODS: dict[str, tuple[dict[str, Any], float, list[Any]]] = {
    "AdaLora": ({"total_step": 9, "init_r": 4, "target_r": 2}, 0.2, [{}, {"use_rslora": True}, {"lora_alpha": 3}, {"lora_dropout": 0.1}, {"init_lora_weights": "pissa"}, {"trainable_token_indices": [1, 2]}, ("conv", {"target_modules": ["c2", "fc"]})]),
    "Beft": ({}, 0.05, [{}]),
    "BOFT": ({}, 0.05, [{}, {"boft_n_butterfly_factor": 2}, {"boft_block_size": 8}, {"boft_block_size": 0, "boft_block_num": 4}, {"boft_dropout": 0.1}, ("conv", {"target_modules": ["c2", "c3", "fc"]}), ("conv", {"boft_block_size": 9, "target_modules": ["c1", "c2"]}), ("conv", {"boft_block_size": 0, "boft_block_num": 3, "target_modules": ["c1", "c2"]}), ("uneven", {}, r"0: PEFT's BOFT takes the first of stride=\(2, 1\) for both dimensions"), ("dilated", {"boft_block_size": 3, "target_modules": ["0"]}, r"0: PEFT's BOFT runs without dilation=\(2, 2\)"), ("circular", {"boft_block_size": 3}, "padding_mode='circular': PEFT's BOFT pads with zeros")]),
    "C3A": ({"block_size": 16}, 0.05, [{}, {"block_size_pattern": {"q_proj": 32}}, {"init_weights": "gaussian"}, {"init_weights": True}]),
    "Deft": ({"r": 4}, 0.05, [{}, {"decomposition_method": "qr"}, {"alpha": 6}, {"init_scale": 0.5}, {"deft_dropout": 0.1}, ("llama", {"para": True}, "para=True takes a part of the weight out and puts nothing in")]),
    "Delora": ({"r": 4}, 0.05, [{}, {"delora_lambda": 8}, {"module_dropout": 0.1}, {"rank_pattern": {"q_proj": 2}}, {"lambda_pattern": {"q_proj": 5}}]),
    "FourierFT": ({"n_frequency": 50}, 0.3, [{}, {"scaling": 50.0}, {"random_loc_seed": 5}, {"n_frequency_pattern": {"q_proj": 20}}, {"init_weights": True}]),
    "Frod": ({"progressbar": False}, 0.1, [{}, {"sparse_rate": 0.1}, {"regularization_alpha": 0.01}, {"frod_dropout": 0.1}, {"projection_prng_key": 3}, {"runtime_offload_base_weight": True}, ("llama", {"save_projection": False}, "save_projection=False: V is determined up to signs alone; save the adapter with True"), ("llama", {"layers_to_transform": [1]}, "trains 32 directions that this layer's weight has not")]),
    "Glora": ({"r": 4}, 0.05, [{}, {"config_A_B": "vector"}, {"config_A_B": "constant", "config_C": "vector"}, {"config_D_E": "none"}, ("bert", {"config_A_B": "none", "config_C": "none", "config_D_E": "vector"}), ("llama", {"config_A_B": "none", "config_C": "none", "config_D_E": "vector"}, "the layer has no bias, and GLoRAConfig")]),
    "Gralora": ({"r": 8}, 0.05, [{}, {"hybrid_r": 4}, {"gralora_k": 4}, {"alpha": 3}, {"gralora_dropout": 0.1}]),
    "Hira": ({"r": 4}, 0.3, [{}, {"rank_pattern": {"q_proj": 2}}, {"hira_dropout": 0.1}, {"init_weights": "gaussian"}, {"target_modules": ["embed_tokens"]}, ("conv", {}), ("conv", {"r": 2, "init_weights": "gaussian"}), ("dilated", {}), ("circular", {}, "padding_mode='circular': PEFT's HiRA pads with zeros")]),
    "HRA": ({"r": 4}, 0.05, [{}, {"init_weights": False}, ("conv", {"target_modules": ["c1", "c2"]}), ("uneven", {}, r"0: PEFT's HRA takes the first of stride=\(2, 1\) for both dimensions"), ("llama", {"apply_GS": True}, r"apply_GS=True is not what this variant computes\n  with PEFT: peft.save_as_lora"), ("dilated", {"target_modules": ["0"]}, r"0: PEFT's HRA runs without dilation=\(2, 2\)"), ("circular", {}, "padding_mode='circular': PEFT's HRA pads with zeros")]),
    "IA3": ({"feedforward_modules": []}, 0.1, [{}, {"feedforward_modules": ["down_proj"]}, {"feedforward_modules": ".*down_proj"}, {"init_ia3_weights": False}, ("gpt2", {"feedforward_modules": ["c_proj"], "fan_in_fan_out": True}), ("conv", {"target_modules": ["c1", "c2", "c3", "fc"]}), ("conv", {"target_modules": ["c2"], "feedforward_modules": ["c2"]}), ("conv", {"target_modules": ["c1", "c2", "c3", "fc"], "feedforward_modules": ["c1", "c3", "fc"]}), ("dilated", {}), ("circular", {}), ("circular", {"feedforward_modules": ["0"]}), ("groups", {})]),
    "Lily": ({"r": 4}, 0.1, [{}, {"stride_A": 2}, {"num_B": 3}, {"scaling": 0.5}, ("llama", {"target_modules": "all-linear"}, r"lora_B differs from that of another layer.*\n  with PEFT: peft.save_as_lora")]),
    "LNTuning": ({}, 0.1, [{"target_modules": ["input_layernorm", "norm"]}, ("gpt2", {"target_modules": ["ln_1", "ln_f"]}), ("llama", {"target_modules": ["q_proj"]}, "a Linear is no norm"), ("conv", {"target_modules": ["c1"]}, "a Conv2d is no norm")]),
    "LoHa": ({"r": 4}, 0.3, [{}, {"alpha": 3}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}, {"rank_dropout": 0.1}, {"module_dropout": 0.1}, {"init_weights": False}, ("conv", {}), ("conv", {"use_effective_conv2d": True}), ("dilated", {}), ("circular", {}, "padding_mode='circular': PEFT's LoHa pads with zeros"), ("groups", {}, "a Conv2d with groups=2, whose patches do not go through one weight")]),
    "LoKr": ({"r": 4}, 0.3, [{}, {"alpha": 3}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}, {"rank_dropout": 0.1}, {"rank_dropout": 0.1, "rank_dropout_scale": True}, {"decompose_both": True}, {"decompose_factor": 4}, {"init_weights": "lycoris"}, {"r": 64}, ("conv", {}), ("conv", {"r": 1}), ("conv", {"r": 1, "use_effective_conv2d": True, "target_modules": ["c1", "c2", "c3", "fc"]}), ("conv", {"r": 1, "decompose_both": True, "decompose_factor": 4}), ("conv", {"decompose_factor": 2, "alpha": 3}), ("pixels", {}), ("dilated", {}), ("circular", {}, "padding_mode='circular': PEFT's LoKr pads with zeros"), ("groups", {}, "a Conv2d with groups=2, whose patches do not go through one weight")]),
    "Miss": ({"r": 8}, 0.05, [{}, {"init_weights": "bat"}, {"init_weights": "mini", "mini_r": 2}, {"miss_dropout": 0.1}, {"r": 6}]),
    "OFT": ({"oft_block_size": 8}, 0.05, [{}, {"use_cayley_neumann": False}, {"num_cayley_neumann_terms": 3}, {"coft": True, "eps": 0.05}, {"coft": True, "eps": 0.05, "use_cayley_neumann": False}, {"block_share": True}, {"module_dropout": 0.1}, {"r": 4, "oft_block_size": 0}, ("conv", {"target_modules": ["c3", "fc"]}), ("conv", {"target_modules": ["c3"], "oft_block_size": 2, "block_share": True, "use_cayley_neumann": False}), ("conv", {"target_modules": ["c2"]}, "of a Conv2d PEFT adds turned patches up where they overlap"), ("llama", {"target_modules": ["embed_tokens"]}, "PEFT turns the table of an embedding")]),
    "Peanut": ({"r": 4}, 0.05, [{}, {"depth": 1}, {"depth": 2, "act_fn": "tanh"}, {"act_fn": "silu"}, {"scaling": 0.5}]),
    "Psoft": ({"r": 8, "psoft_alpha": 8}, 0.05, [{}, {"psoft_alpha": 4}, {"psoft_dropout": 0.1}, {"ab_svd_init": "pissa_init"}, {"psoft_svd": "lowrank"}, {"psoft_orth": False}, {"psoft_mag_b": False}, {"psoft_mag_a": False}, {"use_cayley_neumann": True}, {"use_cayley_neumann": True, "cayley_neumann_eps": 0.1}, {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3}]),
    "Pvera": ({"r": 8}, 0.1, [{}, {"save_projection": False}, {"d_initial": 0.5}, {"pvera_dropout": 0.1}, {"projection_prng_key": 3}, ("llama", {"sample_at_inference": True}, "sample_at_inference=True in adapter_config.json is not what variant 'pvera' reads")]),
    "RandLora": ({"r": 8}, 0.02, [{}, {"sparse": True}, {"very_sparse": True}, {"randlora_alpha": 8}, {"randlora_dropout": 0.1}, ("llama", {"save_projection": False}, "save_projection=False: PEFT draws the bases anew")]),
    "Road": ({"group_size": 32}, 0.05, [{}, {"variant": "road_2"}, {"variant": "road_4"}, {"group_size": 16}]),
    "Shira": ({"r": 4}, 0.05, [{}, {"random_seed": 4}, {"init_weights": False}]),
    "Supertuning": ({"sparsity": 0.9}, 0.05, [{}, {"select_top": False}, {"r": 4, "lora_alpha": 6.0}, {"r": 4, "lora_dropout": 0.1}, ("llama", {"save_precomputed_indices": False}, "leaves out which entries they are; save it with them")]),
    "TinyLora": ({}, 0.5, [{}, {"u": 16}, {"weight_tying": 1.0}, {"save_projection": False}, {"projection_seed": 3}, {"init_weights": "uniform"}, {"tinylora_dropout": 0.1}, ("llama", {"weight_tying": 0.5}, "weight_tying=0.5 has 3 vectors for 6 layers"), ("gpt2", {}), ("gpt2", {"fan_in_fan_out": True, "save_projection": False}), ("gpt2", {"weight_tying": 1.0, "fan_in_fan_out": True, "target_modules": ["wte", "c_attn"]}), {"target_modules": ["embed_tokens"]}, {"target_modules": ["embed_tokens", "q_proj"], "save_projection": False}]),
    "TrainableTokens": ({"token_indices": [1, 5], "target_modules": ["embed_tokens"]}, 0.5, [{}, {"target_modules": None}, {"init_weights": False}, {"target_modules": ["lm_head"]}, ("gpt2", {"target_modules": ["wte"]}), ("tied", {})]),
    "UniLora": ({}, 0.3, [{}, {"proj_seed": 3}, {"save_indices": True}, {"theta_d_length": 99}, {"unilora_dropout": 0.1}]),
    "VBLoRA": ({"num_vectors": 20, "vector_length": 16}, 0.3, [{}, {"save_only_topk_weights": True}, {"topk": 3}, {"vblora_dropout": 0.1}]),
    "Vera": ({"r": 8}, 0.2, [{}, {"save_projection": False}, {"d_initial": 0.5}, {"vera_dropout": 0.1}, {"projection_prng_key": 3}]),
    "WaveFT": ({"n_frequency": 50}, 0.5, [{}, {"scaling": 5.0}, {"wavelet_family": "db4"}, {"use_idwt": False}, {"random_loc_seed": 3}, {"n_frequency_pattern": {"q_proj": 20}}, {"proportional_parameters": True}, ("llama", {"wavelet_family": "sym3"}, "the wavelets here are db1, db2")]),
    "Adamss": ({"r": 8}, 0.05, [{}, {"num_subspaces": 3}, {"subspace_rank": 2}]),
    "OSF": ({}, 0.05, [{}, {"effective_rank": 8}]),
    "Poly": ({"r": 4, "n_tasks": 1, "task_type": "CAUSAL_LM"}, 0.2, [{}, {"n_skills": 2}, {"n_splits": 2}]),
    "Lora": ({"r": 4, "lora_alpha": 6, "init_lora_weights": False}, 0.03, [
        {}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.1}, {"lora_alpha": 1.5}, {"target_modules": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}, {"rank_pattern": {r".*layers\.0.*": 3}, "use_rslora": True},
        {"trainable_token_indices": [1, 2]}, {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}},
        {"target_modules": ["embed_tokens"], "use_rslora": True}, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        {"modules_to_save": ["embed_tokens"]}, {"ensure_weight_tying": True}, {"layers_to_transform": 0}, {"exclude_modules": r".*layers\.0.*"},
        {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}, {"use_qalora": True, "qalora_group_size": 16},
        {"kasa_config": LORA.KasaConfig(), "init_lora_weights": True}, {"kasa_config": LORA.KasaConfig(), "init_lora_weights": True, "use_rslora": True},
        {"velora_config": LORA.VeloraConfig(num_groups=4)}, {"velora_config": LORA.VeloraConfig(num_groups=5, init_type="random"), "use_rslora": True, "lora_dropout": 0.1},
        {"monteclora_config": LORA.MontecloraConfig(num_samples=3, buffer_size=2)}, {"monteclora_config": LORA.MontecloraConfig(sample_scaler=1.0, buffer_size=2), "use_rslora": True, "lora_dropout": 0.1},
        {"lora_bias": True}, {"lora_bias": True, "use_rslora": True, "lora_dropout": 0.1}, ("gpt2", {"lora_bias": True}), ("bert", {"lora_bias": True, "bias": "all"}), ("conv", {"lora_bias": True}),
        {"use_bdlora": LORA.BdLoraConfig(nblocks=2, target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"]), "target_modules": ["q_proj", "down_proj"]},
        {"use_bdlora": LORA.BdLoraConfig(nblocks=4, target_modules_bd_a=["o_proj"], target_modules_bd_b=["k_proj"], match_strict=False), "target_modules": "all-linear", "r": 8, "use_rslora": True},
        ("tied", {"target_modules": ["lm_head", "embed_tokens"]}), ("tied", {"trainable_token_indices": [1, 2]}), ("tied", {"trainable_token_indices": [1, 2], "ensure_weight_tying": True}),
        ("gpt2", {"fan_in_fan_out": False}), ("gpt2", {"fan_in_fan_out": True, "use_dora": True}), ("gpt2", {"target_modules": ["wte", "wpe"], "use_dora": True}),
        ("gpt2", {"target_modules": "all-linear"}), ("gpt2", {"bias": "all", "use_dora": True}), ("gpt2", {"trainable_token_indices": {"wpe": [0, 3]}}),
        ("bert", {"task_type": "SEQ_CLS"}), ("bert", {"task_type": "SEQ_CLS", "bias": "all"}), ("bert", {"modules_to_save": ["pooler"], "bias": "all"}), ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("conv", {}), ("conv", {"use_dora": True}), ("conv", {"bias": "all"}),
        ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "use_rslora": True}),
        {"target_modules": [], "target_parameters": ["q_proj.weight"]}, {"target_parameters": ["up_proj.weight", "o_proj.weight"], "use_rslora": True},
        {"target_modules": ["q_proj"], "target_parameters": ["gate_proj.weight"], "rank_pattern": {"gate_proj": 3, "down_proj.weight": 2, r"gate_proj\.weight": 6}},
        {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight", "embed_tokens.weight"]}, ("tied", {"target_modules": [], "target_parameters": ["embed_tokens.weight"]}),
        ("tied", {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]}),
        ("gpt2", {"target_modules": [], "target_parameters": ["c_attn.weight", "c_proj.weight", "wte.weight"]}), ("bert", {"target_parameters": ["query.weight"]}),
        ("mixtral", {"target_parameters": ["k_proj.weight", "experts.down_proj"]}),
        ("mixtral", {"target_modules": ["gate"]}, "gate.lora_A.weight belongs to no layer of this Mixtral"),
        ("groups", {"target_modules": ["c2"]}, "a convolution with groups=2, which a low-rank product is not"),
        ("tied", {"modules_to_save": ["embed_tokens"]}, "which would no longer be tied to it; untie them first: give one of the two a copy"),
        ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "there are tensors of lm_head, which the config does not select"),
        ("llama", {"lora_alpha": 0}, r"LoRAConfig\(alpha=0\): alpha is a number above 0"),
        ("llama", {"layer_replication": [[0, 1], [0, 2]]}, "builds another model of the base's layers"),
        ("llama", {"target_parameters": ["o_proj.weight"], "init_lora_weights": "pissa"}, "with target_parameters: the start that is out of model.layers.0.self_attn.o_proj.* is not made again here"),
        ("mixtral", {"target_parameters": ["gate.weight"]}, "gate.lora_A.weight belongs to no layer of this Mixtral"),
    ]),
}  # fmt: skip

# What every method may be used with: the model and the fields. PEFT has not all methods on all layers.
STORED = {
    "AdaLora",
    "Deft",
    "FourierFT",
    "Gralora",
    "Hira",
    "IA3",
    "Lora",
    "Pvera",
    "RandLora",
    "UniLora",
    "VBLoRA",
    "Vera",
    "WaveFT",
}
EVERY: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "a pattern": ("llama", {"target_modules": r".*\.(q|k)_proj"}),
    "a head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "a tied head": ("tied", {"target_modules": ["lm_head"]}),
    "one block": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "without": ("llama", {"exclude_modules": ["q_proj"]}),
    "a module": ("llama", {"modules_to_save": ["lm_head"]}),
    "biases": ("bert", {"bias": "all"}),
    "own biases": ("bert", {"bias": "lora_only"}),
    "stored transposed": ("gpt2", {}),
    "bfloat16": ("bfloat16", {}),
    "float64": ("float64", {}),
}
LEFT_OUT = {
    ("Lily", "all linear"),
    ("Frod", "one block"),
    ("Psoft", "float64"),
    ("UniLora", "own biases"),
}  # refused above, or by PEFT


def options() -> dict[str, Case]:
    """Each method's own options."""
    made: dict[str, Case] = {}
    for method, (needed, size, cases) in METHODS.items():
        for one in cases:
            base, fields, *refused = one if isinstance(one, tuple) else ("llama", one)
            shown = ", ".join(f"{key}={str(value)[:40]}" for key, value in fields.items())
            made[f"{method} {base} {shown}"] = Case(base, method, {**needed, **fields}, *refused[:1] or ("",), size)
    return made


def everywhere() -> dict[str, Case]:
    """Every method with what all have in common."""
    made: dict[str, Case] = {}
    for method, (needed, size, _) in METHODS.items():
        held = {field.name for field in dataclasses.fields(getattr(peft, f"{method}Config"))}
        for name, (base, fields) in EVERY.items():
            of_its_own = method in ("LNTuning", "TrainableTokens") and (
                "target_modules" in fields or "exclude_modules" in fields
            )
            not_there = (name == "stored transposed" and method not in STORED) or (method, name) in LEFT_OUT
            if set(fields) <= held and not of_its_own and not not_there:
                made[f"{method} {name}"] = Case(base, method, {**needed, **fields}, size=size)
    return made
