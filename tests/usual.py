"""The variants that the tests of every mechanism take: together they use all sides, kinds of tensors and hooks of the
first methods. The kit, the packages' own tests and `-m slow` take the others.

Their learning rates for AdamW are those that the methods' authors, and large comparisons of the methods, use."""

USUAL_LR = {
    "antipasto": 5e-3,
    "delora": 1e-3,
    "dora": 1e-4,
    "eva": 1e-4,
    "hra": 1e-4,
    "ia3": 5e-3,
    "ia3_ff": 5e-3,
    "lora": 1e-4,
    "lora_xs": 4e-3,
    "oft": 1e-3,
    "pissa": 1e-4,
    "road": 1e-3,
    "ssvd": 5e-3,
    "trainable_tokens": 1e-3,
}

SPREAD = sorted(USUAL_LR)

# What those have not: tensors that layers share, schedules, penalties, gradients at the start, a router, the weight in
# forward, what the model was called with, whole blocks.
OTHERS = (
    "adalora", "alora", "hira", "houlsby", "lora_fa", "lora_ga", "loreft", "molora", "randlora", "tied_lora", "vb_lora", "vera",
)  # fmt: skip
NEEDED = {"alora": {"invocation_tokens": (1,)}}  # fields that have no default
