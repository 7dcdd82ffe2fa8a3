"""The model card of an export: README.md with the front matter that the Hugging Face hub reads."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dsa_jax.checkpoints.hf.families import FAMILIES
from dsa_jax.checkpoints.hf.weights import read_json
from dsa_jax.config import STAGES
from dsa_jax.foreign import printable
from dsa_jax.report.page import columns_of, with_tasks
from dsa_jax.report.parts import format_cell
from dsa_jax.report.verdict import verdict
from dsa_jax.run.files import read_regular

CARD = "README.md"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENSE_FIELDS = ("license", "license_name", "license_link")
_MOST_BYTES = 2**20
_TAGS = ["dsa-jax", "deepseek-sparse-attention", "sparse-attention", "jax"]
_TRAINED = {
    "pretrain": "all parameters, from scratch",
    "warmup": "the indexers only, against dense attention",
    "sparse": "all parameters, on the selected keys",
}


class Base(NamedTuple):
    """The model that a run began from: its name, its id on the hub if it has one, and what its card says of its license."""

    name: str
    hub_id: str = ""
    license: Mapping[str, str] = {}


def base_of(hf_dir: str, source: Path) -> Base:
    """The base model of a run.

    Args:
        hf_dir: the directory that the run began from, which may be gone.
        source: where its config.json, and its README.md if it has one, are now.
    """
    parts = Path(hf_dir).parts
    cached = [part.split("--", 2)[1:] for part in parts if re.fullmatch(r"models--[^-].*?--.+", part)]
    stated = read_json(source / "config.json").get("_name_or_path") if (source / "config.json").is_file() else None
    found = "/".join(cached[-1]) if cached else stated
    hub_id = found if isinstance(found, str) and _ID.fullmatch(found) else ""
    return Base(hub_id or (parts[-1] if parts else ""), hub_id, _license(source / CARD))


def model_card(report: Mapping[str, Any], base: Base, model_type: str) -> str:
    """The card of an export, in Markdown.

    Args:
        report: plain JSON values, see `report.write_report`.
        base: the model that the run began from.
        model_type: of the exported config.json.
    """
    family = FAMILIES.get(model_type)
    is_known = family is not None and family.indexer is not None
    front: dict[str, Any] = {**base.license, "library_name": "transformers" if is_known else "dsa-jax"}
    front |= {"base_model": base.hub_id, "base_model_relation": "finetune"} if base.hub_id else {}
    front |= {"pipeline_tag": "text-generation", "tags": _TAGS}
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    found = verdict(report)
    sections = [
        f"# {_plain(report['name'])}",
        f"{_plain(base.name)} with DeepSeek Sparse Attention: a lightning indexer in each layer selects the keys that a query "
        "attends to. Made with dsa-jax.",
        "## What was done",
        _stages(report),
        f"Text: {_plain(_text_name(report))}.",
        "## What it keeps and saves",
        *(_plain(sentence) for sentence in (found.quality, found.savings) if sentence),
        _parity(report["rows"]),
        "## How to load it",
        _loading(model_type, is_known=is_known),
        "## Limits",
        "\n".join(f"- {_plain(limit)}" for limit in _limits(report, found.doubts, base)),
    ]
    return f"---\n{text}---\n\n" + "\n\n".join(sections) + "\n\n"


def _license(card: Path) -> dict[str, str]:
    """What the front matter of a card says of the license; nothing where it has none that can be read."""
    try:
        content = read_regular(card, follow=True)[:_MOST_BYTES].decode("utf-8")
        match = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", content, re.DOTALL)
        # The base loader gives plain strings, and expands no merged mappings.
        front = yaml.load(match[1], yaml.BaseLoader) if match else {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(front, dict):
        return {}
    found = {name: front[name] for name in _LICENSE_FIELDS if isinstance(front.get(name), str) and front[name]}
    return {name: printable(value) for name, value in found.items()} if "license" in found else {}


def _plain(text: object) -> str:
    """Text that Markdown and HTML leave as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|&!~$])", r"\\\1", printable(text, 2000))


def _stages(report: Mapping[str, Any]) -> str:
    stages = report.get("stages") or {}
    rows = [
        [name, _TRAINED[name], f"{stages[name].get('steps', 0):,}", f"{stages[name].get('tokens', 0):,}"]
        for name in STAGES
        if name in stages
    ]
    return _table(["stage", "trained", "steps", "tokens"], rows) if rows else "Nothing was trained."


def _parity(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = columns_of(rows)
    cells = [[str(row["name"]), *(format_cell(key, row.get(key)) for key, _ in columns[1:])] for row in map(with_tasks, rows)]
    return _table([title for _, title in columns], cells)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text_name(report: Mapping[str, Any]) -> str:
    """The last part of the path of the text: a whole path would tell of a machine."""
    data = (report.get("config") or {}).get("data") or {}
    if not (report.get("corpus") or {}).get("text"):
        return "none, synthetic tasks only"
    path = (data.get("text") or {}).get("path") or ""
    return Path(path).name if path else "the source of the Python standard library"


def _loading(model_type: str, *, is_known: bool) -> str:
    ours = "```python\nfrom dsa_jax import load_pretrained\n\nmodel = load_pretrained('DIRECTORY')\n```"
    if is_known:
        theirs = (
            "```python\nfrom transformers import AutoModelForCausalLM\n\nAutoModelForCausalLM.from_pretrained('DIRECTORY')\n```"
        )
        return f"With dsa-jax:\n\n{ours}\n\nWith transformers, which knows `{model_type}` and its indexer:\n\n{theirs}"
    others = "Other programs ignore the indexer and compute dense attention, or refuse the checkpoint."
    return f"With dsa-jax, which alone computes sparse attention for this model:\n\n{ours}\n\n{others}"


def _limits(report: Mapping[str, Any], doubts: Sequence[str], base: Base) -> list[str]:
    evaluated = (report.get("config") or {}).get("eval") or {}
    lengths = f"at most {max(evaluated.get('text_len', 0), evaluated.get('recall_len', 0), *_text_task_lens(evaluated))} tokens"
    return [
        *doubts,
        f"The table is measured on held-out rows of {lengths}; nothing is known of longer ones.",
        f"What {base.name or 'the base model'} gets wrong, and its biases, are still there; safety was not evaluated.",
        *([] if base.license else ["The license of the base model is not known here; it applies to this model, too."]),
    ]


def _text_task_lens(evaluated: Mapping[str, Any]) -> Sequence[int]:
    return evaluated.get("text_task_lens", ()) if evaluated.get("text_tasks") else ()
