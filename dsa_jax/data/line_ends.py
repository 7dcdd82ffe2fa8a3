r"""Line ends at which a tokenizer.json certainly begins anew, so that the ids of the pieces are the ids of the whole text.

A model (BPE, Unigram, ...) sees the pieces of the pre-tokenizer one by one. So a text may be cut where the whole has an edge
between two of them, and where neither side, read alone, is divided differently. Two kinds of places qualify: before the newline
that follows a letter or digit, and after the newline between something visible and a letter or digit. There

- no alternative of the patterns below matches across the cut, and one of them matches white space alone, so that it has an
  edge. The last of several spaces belongs to the word that follows, by `\s+(?!\S)`; at these places white space ends as it
  does in the whole text, or is one newline.
- no normalizer below changes what stands beside the cut into something else.
- no added token may span the cut or take the white space beside it, which is checked.
"""

import re
from typing import Any

# Letters and digits in every version of Unicode; the normalizers below make other letters of them, or none.
_WORD = (
    "0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff\u0391-\u03a1\u03a3-\u03a9\u03ac-\u03ce\u0400-\u0481\u048a-\u04ff"
    "\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0904-\u0939\u0e01-\u0e30\u3041-\u3094\u30a1-\u30f6\u4e00-\u9fa5\uac00-\ud7a3"
)
_CUTS = re.compile(f"(?<=[{_WORD}])(?=\r?\n)|(?<=[^\\s\u180e\u200b]\n)(?=[{_WORD}])")
_NORMALIZERS = ("NFC", "NFKC", "Lowercase")

_SUFFIXES = (
    "'s|'t|'re|'ve|'m|'ll|'d",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
)
_DIGITS = (r"\p{N}", r"\p{N}{1,3}", r"\p{N}+")
_SPACE = r"\s+(?!\S)|\s+"
_GPT2 = rf"{_SUFFIXES[0]}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACE}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ANY_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+"
_DIVIDING = {  # patterns of published tokenizers that match across no cut, and have an edge at each
    _GPT2,
    "[\r\n]",
    r"[\r\n]",
    # Llama 3 (three digits), Qwen 2 and 3 (one), GLM 4
    *(
        rf"{suffixes}|{_ANY_PREFIX}\p{{L}}+|{digits}|{_PUNCTUATION}[\r\n]*|\s*[\r\n]+|{_SPACE}"
        for suffixes in _SUFFIXES
        for digits in _DIGITS
    ),
    # GPT-4o (three digits), Mistral's Tekken (one, and no suffixes)
    *(
        rf"{_ANY_PREFIX}{_UPPER}*{_LOWER}+{suffix}|{_ANY_PREFIX}{_UPPER}+{_LOWER}*{suffix}|{digits}|{_PUNCTUATION}[\r\n/]*"
        rf"|\s*[\r\n]+|{_SPACE}"
        for suffix in ("", f"{_SUFFIXES[1]}?", f"{_SUFFIXES[2]}?")
        for digits in _DIGITS
    ),
    # DeepSeek-V3
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    rf"|\s*[\r\n]+|{_SPACE}",
}
_INSIDE_LINES = {*_DIGITS, _CJK}  # patterns that match nothing beside a newline
# Steps that divide each of the pieces before them without looking at its neighbours.
_LOCAL = ("Split", "ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer")


def safe_cuts(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """The places at which a text may be cut, for a parsed tokenizer.json; None where none is certain."""
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    while steps and _is_inside_lines(steps[0]):
        steps = steps[1:]
    is_safe = (
        all(step["type"] in _NORMALIZERS for step in _steps(spec["normalizer"], "normalizers"))
        and bool(steps)
        and _is_dividing(steps[0])
        and all(step["type"] in _LOCAL for step in steps[1:])
        and not any(_reaches_over(token) for token in spec["added_tokens"])
    )
    return _CUTS if is_safe else None


def _steps(part: dict[str, Any] | None, plural: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as its steps in order."""
    if part is None:
        return []
    return [step for inner in part[plural] for step in _steps(inner, plural)] if part["type"] == "Sequence" else [part]


def _is_dividing(step: dict[str, Any]) -> bool:
    """Whether a step has an edge at every cut."""
    match step["type"]:
        case "Whitespace" | "WhitespaceSplit" | "BertPreTokenizer":
            return True
        case "ByteLevel":
            return step["use_regex"] and not step["add_prefix_space"]
        case "Split":
            return step["behavior"] in ("Isolated", "Removed") and step["pattern"].get("Regex") in _DIVIDING
    return False


def _is_inside_lines(step: dict[str, Any]) -> bool:
    """Whether a step divides text at places that have nothing to do with newlines."""
    match step["type"]:
        case "Digits":
            return True
        case "Punctuation":
            return step["behavior"] in ("Isolated", "Removed", "Contiguous")
        case "Split":
            return step["behavior"] in ("Isolated", "Removed") and step["pattern"].get("Regex") in _INSIDE_LINES
    return False


def _reaches_over(token: dict[str, Any]) -> bool:
    """Whether an added token may span a cut, or take white space on its other side."""
    content = token["content"]
    spans = re.search(f"[{_WORD}][\r\n]|[\r\n][{_WORD}]", content)
    takes = (token["rstrip"] and re.search(f"[{_WORD}]$", content)) or (token["lstrip"] and re.match(f"[{_WORD}]", content))
    return bool(spans or takes)
