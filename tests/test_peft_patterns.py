"""PEFT's patterns are matched as Python's re does, by other means: no pattern keeps us busy."""

from __future__ import annotations

import random
import re
import time

import pytest

import lora_lite as ll
from lora_lite_core.files.peft.config_json.patterns import Patterns

NAMES = [
    "model",
    "model.layers.0.self_attn.q_proj",
    "layers.10.mlp.up_proj",
    "lm_head",
    "a.b",
    "ab",
    "",
    "éa.b-c",
    "x1.1",
]
WRITTEN = [  # by people and tools, in files that are about
    r".*\.(q|k)_proj",
    r"(q|v)_proj$",
    "^lm_head",
    r"layers\.1\..*down_proj",
    r"^model\.layers\.0\.self_attn\.q_proj",
    "model.layers.0.self_attn.q_proj",
    "self-attn",
    r"model\.layers\.([0-9]|1[0-9])\.mlp\.(up|down)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|ffn).*?(?:q_proj|k_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|up_proj)))",
    r"(?P<block>layers)\.\d{1,2}\..+?_proj",
    r"[^.]+",
    r"[]a-z.]*\b",
    r"\Amodel\Z|ab",
    r"x{,}a{0}b?{1}"[:6],
    r"\w+\W\w+\Ba",
    r"a{2,3}|(ab){1}|a{,2}b",
    "x{1",
    "x{a}",
    r"\x61\u0062",
    r"[[a&&b~~c||d]+",
]


def theirs(kind: str, pattern: str, name: str) -> bool:
    """What PEFT computes."""
    text = {"selects": rf"(.*\.)?({pattern})$", "contains": rf"(^|.*\.){pattern}($|\..*)"}.get(kind, pattern)
    return bool(re.fullmatch(text, name) if kind == "fullmatch" else re.match(text, name))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # Python's own, of sets
@pytest.mark.parametrize("kind", ["fullmatch", "selects", "contains"])
@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_is_about(kind: str, pattern: str) -> None:
    patterns = Patterns(NAMES)
    for name in NAMES:
        assert getattr(patterns, kind)("target_modules", pattern, name) == theirs(kind, pattern, name), name


def drawn(draw: random.Random, depth: int) -> str:
    """A random pattern."""
    kind = draw.randrange(9 if depth else 5)
    if kind < 3:
        return draw.choice(["a", "b", r"\.", ".", "1", r"\d", r"\w", "[ab]", "[^a.]", "_"])
    if kind == 3:
        return draw.choice(["^", "$", r"\b", r"\B", ""])
    if kind == 4:
        return "".join(draw.choice("ab1.") for _ in range(draw.randrange(1, 4)))
    inner = drawn(draw, depth - 1)
    if kind == 5:
        return inner + drawn(draw, depth - 1)
    if kind == 6:
        return f"({inner}|{drawn(draw, depth - 1)})"
    return f"(?:{inner})" + draw.choice(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,1}", "{1,}"])


@pytest.mark.parametrize("seed", range(20))
def test_random_patterns(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        pattern = drawn(draw, 4)
        names = ["".join(draw.choice("ab1._") for _ in range(draw.randrange(1, 8))) for _ in range(8)]
        patterns = Patterns(names)
        for kind in ("fullmatch", "selects", "contains"):
            for name in names:
                assert getattr(patterns, kind)("x", pattern, name) == theirs(kind, pattern, name), (kind, pattern, name)


BOMBS = [
    "(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*)*x", "([a-z_.]+)*!", "(a?){50}a{50}", ".*.*.*.*.*.*.*.*.*.*.*.*!",
    "(((a*)*)*)*b", "(?:a|b|ab)*(?:a|b|ab)*(?:a|b|ab)*c", "(a*)*" * 20 + "b",
]  # fmt: skip


@pytest.mark.parametrize("pattern", BOMBS)
def test_bombs_are_just_matched(pattern: str) -> None:
    name = "a" * 5_000 + "!"
    start = time.process_time()
    patterns = Patterns([name] * 10)
    for kind in ("fullmatch", "selects", "contains"):
        getattr(patterns, kind)("target_modules", pattern, name)
    assert time.process_time() - start < 8


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(?=a)b", "has look-around, a backreference, a flag or another extension"),
        (r"(?<!a)b", "has look-around"),
        (r"(a)\1", "has a set or an escape that is not known here"),
        ("(?i)a", "has look-around, a backreference, a flag or another extension"),
        ("(?>a*)a", "has look-around, a backreference, a flag"),
        ("(?P=x)", "has look-around, a backreference, a flag"),
        ("a*+", "repeats a repeat"),
        ("a**", "repeats a repeat"),
        ("*a", "repeats nothing"),
        ("a|+", "repeats nothing"),
        ("^*", "repeats what takes no character"),
        ("(a", "opens a bracket that is not closed"),
        ("a)", "closes a bracket that is not open"),
        ("[a", "has a set or an escape that is not known here"),
        ("[z-a]", r"has a set that is wrong \(bad character range z-a"),
        ("[a--b]", "has a set or an escape that is not known here"),
        ("a\\", "has a set or an escape that is not known here"),
        (r"\y", "has a set or an escape that is not known here"),
        ("a{3,2}", "comes at most fewer times than at least"),
        ("a{9999999}", "needs more than 20,000 states"),
        ("a{999999}", "needs more than 20,000 states"),
        ("((a{999}){999}){999}", "needs more than 20,000 states"),
        ("(((){999999}){999999}){999999}", "needs more than 20,000 states"),
        ("(" * 5_000, "has more than 50 brackets in brackets"),
        ("(" * 5_000 + ")" * 5_000, "has more than 50 brackets in brackets"),
        ("a" * 20_001, "has more than 20,000 characters"),
        ("(a|b)*a" + "(a|b)" * 2_000 + "(c|d)*" * 500, "takes too many steps"),
    ],
)
def test_what_is_refused(pattern: str, why: str) -> None:
    start = time.process_time()
    with pytest.raises(ll.AdapterFileError, match=rf"^rank_pattern: the pattern '.* {why}.*; write the names of the"):
        Patterns([]).fullmatch("rank_pattern", pattern, "ab" * 5_000)
    assert time.process_time() - start < 8


def test_many_patterns_share_the_steps() -> None:
    patterns = Patterns([])
    start = time.process_time()

    def run() -> None:
        for number in range(1_000_000):
            patterns.selects("rank_pattern", f"(x|y){number}", "model.layers.0.q_proj")

    with pytest.raises(ll.AdapterFileError, match="takes too many steps, with what else is to be matched here"):
        run()
    with pytest.raises(ll.AdapterFileError, match="takes too many steps"):
        patterns.selects("rank_pattern", "q_proj", "q_proj")
    assert time.process_time() - start < 8


def test_as_many_plain_names_as_a_large_model_has_cost_little() -> None:
    names = [f"model.layers.{block}.{part}.{i}_proj" for block in range(80) for part in ("attn", "mlp") for i in "abcd"]
    patterns, start = Patterns(names), time.process_time()
    for name in names:
        assert sum(patterns.selects("rank_pattern", "^" + re.escape(other), name) for other in names) == 1
        assert sum(patterns.selects("rank_pattern", other, name) for other in names) == 1
    assert time.process_time() - start < 8
