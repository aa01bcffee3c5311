"""The formulas of the docstrings, written in plain characters, as TeX for the pages of docs/."""

from __future__ import annotations

import re
import unicodedata

GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"),
    *("xi", "pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega"),
)
SYMBOLS = {
    "·": r"\cdot ", "⊙": r"\odot ", "⊗": r"\otimes ", "×": r"\times ", "‖": r"\Vert ", "−": "-", "–": "-", "→": r"\to ",
    "←": r"\leftarrow ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "±": r"\pm ",
    "∘": r"\circ ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "∂": r"\partial ",
    "∇": r"\nabla ",
    "Σ": r"\Sigma ", "∏": r"\prod ", "∑": r"\sum ", "…": r"\dots ", "∞": r"\infty ", "∝": r"\propto ", "∼": r"\sim ",
    "~": r"\sim ", "⊕": r"\oplus ", "⟨": r"\langle ", "⟩": r"\rangle ", "∗": "*", "%": r"\%", "&": r"\&", "#": r"\#",
    "{": r"\{", "}": r"\}", "★": r"\star ", "½": r"\tfrac12 ", "′": "'", "√": r"\surd ",
}  # fmt: skip
ABOVE = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ᵀᵏⁱⁿʳᵐˡᵗᵇᴴ", "0123456789-+TkinrmltbH", strict=True))
BELOW = dict(zip("₀₁₂₃₄₅₆₇₈₉ᵢⱼₖₗₘₙₚᵣₛₜ₊₋ₐₓ", "0123456789ijklmnprst+-ax", strict=True))
ACCENTS = {"\u0302": "hat", "\u0303": "tilde", "\u0304": "bar"}
_TOKEN = re.compile(
    r"(?P<text>[^\W\d_]{3,}'s?(?!\w)|[^\W\d_]{2,}(?:-[^\W\d_]{2,})+)|(?P<word>[^\W\d_]+\d*(?:_[^\W_]+)*'*)"
    r"|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)|(?P<space>\s+)|(?P<other>.)",
    re.DOTALL,
)


def typeset(block: str) -> str:
    """An indented block of one or more lines as a display formula, each line on its own, long ones on several."""
    lines = [_line(row) for line in block.splitlines() if line.strip() for row in _rows(line.strip())]
    inner = lines[0] if len(lines) == 1 else r"\begin{array}{l}" + r" \\ ".join(lines) + r"\end{array}"
    return f"$$\n{inner}\n$$\n"


def _rows(line: str, most: int = 64) -> list[str]:
    """The parts of a line, which three and more spaces stand between, on as few rows as hold them."""
    rows: list[str] = []
    for part in re.split(r"\s{3,}", line):
        if rows and len(rows[-1]) + len(part) < most:
            rows[-1] += "   " + part
        else:
            rows.append(part)
    return rows


def _line(text: str) -> str:
    parts = [unicodedata.normalize("NFD", c) for c in text]
    text = _grouped("".join(new if new[1:] in ACCENTS else old for old, new in zip(text, parts, strict=True)))
    found, made = [*_TOKEN.finditer(text)], ""
    for before, match, after in zip([None, *found], found, [*found[1:], None], strict=False):
        kind, token = match.lastgroup, match.group()
        if kind == "text":
            made += rf"\text{{{token}}}"
        elif kind == "word":
            made += _word(token)
        elif kind == "space":
            made += r" \quad " if len(token) > 2 else r"\ " if _upright(before) or _upright(after) else " "
        elif token in ACCENTS:
            made = re.sub(r"(\\?\w+)\s*$", lambda m, t=token: f"\\{ACCENTS[t]}{{{m[1]}}} ", made)
        else:
            made += _GROUPS.get(token) or SYMBOLS.get(token, token)
    return made


def _upright(match: re.Match[str] | None) -> bool:
    return match is not None and (match.lastgroup == "text" or _is_name(match[0]))


def _is_name(token: str) -> bool:
    """A whole word: neither a Greek letter nor one or two letters that stand for a variable."""
    head = re.split(r"[_\d']", token)[0]
    short = len(head) < 2 or (len(head) == 2 and (not head.isascii() or head[0] in "dV"))
    return head.isalpha() and head not in GREEK and not short


_GROUPS = {"\ue000": "^{", "\ue001": "_{", "\ue002": "}"}


def _grouped(text: str) -> str:
    """Runs of raised and lowered characters between marks."""
    for marks, opening in ((ABOVE, "\ue000"), (BELOW, "\ue001")):
        text = re.sub(
            f"[{''.join(marks)}]+",
            lambda m, marks=marks, opening=opening: opening + " ".join(marks[c] for c in m[0]) + "\ue002",
            text,
        )
    return text


def _word(token: str) -> str:
    """Names: Greek ones, single letters with what is below them (A0 as A₀), functions; whole words upright."""
    bare = token.rstrip("'")
    primes, (head, *below) = "'" * (len(token) - len(bare)), bare.split("_")
    letters = head.rstrip("0123456789")
    below = [part for part in (head[len(letters) :], *below) if part]
    if letters == "Vh":
        letters, below = "V", ["h", *below]
    greek = f"\\{letters} " if letters in GREEK else " ".join(letters)
    made = rf"\mathrm{{{letters}}}" if _is_name(letters) else greek
    return made + (rf"_{{\mathrm{{{','.join(below)}}}}}" if below else "") + primes


def prose(text: str) -> str:
    """Plain text as Markdown that says the same; what stands in backticks stays code."""
    parts = re.split(r"(`[^`\n]+`)", text)
    return "".join(
        part if number % 2 else re.sub(r"([\\`*_{}\[\]<>$|~#])", r"\\\1", part) for number, part in enumerate(parts)
    )
