"""What the files beside a tokenizer.json add to it: tokens, their roles, and whether a text starts with begin-of-text."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from dsa_jax.config import ConfigError
from dsa_jax.foreign import read_object, shown

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


class DeclaredToken(NamedTuple):
    """A token that a file declares: its text, its id or None where it takes the next free one, and flags of an `AddedToken`."""

    content: str
    id: int | None
    flags: dict[str, bool]


class TokenizerSettings(NamedTuple):
    """The settings beside a tokenizer.json.

    Fields: `declared` tokens, those with an id first, by id; `roles` content by role, such as `eos_token`; `add_bos` whether a
    text starts with the bos_token; `end_ids` and `vocab_size` of a model's config.json, empty and None where it has none.
    """

    declared: list[DeclaredToken]
    roles: dict[str, str]
    add_bos: bool
    end_ids: list[int]
    vocab_size: int | None


def read_settings(folder: Path) -> TokenizerSettings:
    """The settings in tokenizer_config.json, special_tokens_map.json, added_tokens.json and config.json, each optional.

    Roles are those of tokenizer_config.json and, where it names none, of special_tokens_map.json. Where the first has no
    `added_tokens_decoder`, older versions of transformers wrote it: then the second counts for more, and added_tokens.json has
    the ids.

    Raises:
        ConfigError: for a file that is not a JSON object, or that declares a token in another form than text and id.
    """
    config, special = _read_object(folder / "tokenizer_config.json"), _read_object(folder / "special_tokens_map.json")
    if "added_tokens_decoder" in config:
        roles = _roles(special) | _roles(config)
        by_id = _by_id(config, folder)
    else:
        roles = _roles(config) | _roles(special)
        by_id = _by_text(folder / "added_tokens.json", {*roles.values()})
    free = [token for source in (config, special) for name in _LISTS for token in _entries(source.get(name))]
    # An object in this file describes a token; a string, there and in the other file, only names one.
    free += [special["eos_token"]] if isinstance(special.get("eos_token"), dict) else []
    placed = {token.content for token in by_id.values()}
    without_id = {text: DeclaredToken(text, None, _flags(token)) for token in free if (text := _content(token)) not in placed}
    model = _read_model(folder / "config.json")
    ids = model.get("eos_token_id")
    size = model.get("vocab_size")
    return TokenizerSettings(
        [by_id[token] for token in sorted(by_id)] + [token for text, token in without_id.items() if text],
        roles,
        config.get("add_bos_token") is True,
        [token for token in (ids if isinstance(ids, list) else [ids]) if type(token) is int],
        size if type(size) is int else None,
    )


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is no file."""
    return read_object(file, ConfigError) if file.is_file() else {}


def _read_model(file: Path) -> dict[str, Any]:
    """A model's config.json; empty where it cannot be read, which its own reader reports."""
    try:
        return _read_object(file)
    except ConfigError:
        return {}


def _roles(content: dict[str, Any]) -> dict[str, str]:
    return {role: text for role, value in content.items() if role.endswith("_token") and (text := _content(value))}


def _content(token: Any) -> str:
    """The text of a token that is written as a string or as an object with `content`; empty for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        return ""
    if re.search("[\ud800-\udfff]", text):
        raise ConfigError(f"a token beside a tokenizer.json is {shown(text)}, with half of a surrogate pair; expected text.")
    return text


def _flags(token: Any, *, special: bool = True) -> dict[str, bool]:
    """The flags of a token; one without any matches as it is written."""
    stated = token if isinstance(token, dict) else {}
    return {"special": special, "normalized": not special} | {name: bool(stated[name]) for name in _FLAGS if name in stated}


def _entries(tokens: Any) -> list[Any]:
    """The tokens of a list, or of an object that names each."""
    return list(tokens.values()) if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else []


def _by_id(config: dict[str, Any], folder: Path) -> dict[int, DeclaredToken]:
    file, decoder, found = folder / "tokenizer_config.json", config["added_tokens_decoder"] or {}, {}
    if not isinstance(decoder, dict):
        raise ConfigError(f"{file}: added_tokens_decoder is a {type(decoder).__name__}; expected an object of tokens by id.")
    for key, token in decoder.items():
        if not (key.isascii() and key.isdigit() and len(key) < 11 and _content(token)):
            raise ConfigError(
                f'{file}: added_tokens_decoder has {key!r}; expected an id with a token, "44": {{"content": "<a>"}}.'
            )
        found[int(key)] = DeclaredToken(_content(token), int(key), _flags(token, special=False))
    return found


def _by_text(file: Path, roles: set[str]) -> dict[int, DeclaredToken]:
    added = _read_object(file)
    for text, token in added.items():
        if not _content(text) or type(token) is not int or token < 0:
            raise ConfigError(f'{file} has {text!r}: {token!r}; expected a token and its id, such as "<a>": 44.')
    return {token: DeclaredToken(text, token, _flags(text, special=text in roles)) for text, token in added.items()}
