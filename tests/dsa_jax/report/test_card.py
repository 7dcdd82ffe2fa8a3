"""The model card of an export: front matter that a YAML parser reads, hostile names, and files that are kept."""

import json
import re

import pytest
import yaml

from dsa_jax.config import Config
from dsa_jax.report.card import Base, base_of, model_card
from dsa_jax.report.report import to_plain
from dsa_jax.run.directory import open_run
from dsa_jax.run.export import admit_export, require_own_export, write_card
from dsa_jax.run.files import RunError
from dsa_jax.run.signed import is_signed, signed
from tests.dsa_jax.report.test_report import make_report

HOSTILE = "a: b\n---\n# <script>alert(1)</script> | `x` \x1b[31m [y](z) \u202e \udcff"


def plain_report(**config):
    report = to_plain(make_report())
    report["config"] = {
        "data": {"text": {"path": "/home/me/books/*.txt"}},
        "eval": {"text_len": 128, "recall_len": 256},
    } | config
    report["corpus"] = {"text": {"sha256": "0"}}
    return report


def front_matter(card):
    match = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    return yaml.safe_load(match[1])


def test_a_card_says_what_was_done_what_it_keeps_and_how_to_load_it():
    base = Base("org/model", "org/model", {"license": "apache-2.0"})
    card = model_card(plain_report(), base, "llama")
    assert front_matter(card) == {
        "license": "apache-2.0",
        "library_name": "dsa-jax",
        "base_model": "org/model",
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
        "tags": ["dsa-jax", "deepseek-sparse-attention", "sparse-attention", "jax"],
    }
    assert "| warmup | the indexers only, against dense attention | 150 | 614,400 |" in card
    assert "Text: \\*.txt." in card and "/home" not in card
    assert "recall 93.0% instead of 95.0%" in card and "| sparse | 0.930 | 2.325 | 0.910 | 15.6 |" in card
    assert "load_pretrained('DIRECTORY')" in card and "AutoModelForCausalLM" not in card
    assert "at most 256 tokens" in card and "license of the base model is not known" not in card
    known = model_card(plain_report(), Base("mine"), "deepseek_v32")
    assert front_matter(known)["library_name"] == "transformers" and "AutoModelForCausalLM" in known
    assert "base_model" not in front_matter(known) and "license of the base model is not known" in known


@pytest.mark.parametrize("name", [HOSTILE, "- x: [", "'\"", "x" * 5000, "{{jinja}} %YAML", "日本語"])
def test_hostile_names_stay_text(name):
    report = plain_report() | {"name": name}
    report["config"]["data"]["text"]["path"] = f"/data/{name}".replace("\n", " ")
    report["rows"][2]["name"] = name
    base = Base(name, "", {"license": "other", "license_name": name.encode("utf-8", "replace").decode()})
    card = model_card(report, base, name)
    card.encode()
    front = front_matter(card)
    assert front["license"] == "other" and set(front) == {"license", "license_name", "library_name", "pipeline_tag", "tags"}
    body = card.split("\n---\n", 1)[1]
    assert "<script>" not in body.replace("\\<script\\>", "") and "\x1b" not in body and "\u202e" not in body
    assert sum(line.startswith("#") for line in body.splitlines()) == 5
    tables = [line for line in body.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert sorted(set(widths)) == [5, 6]


@pytest.mark.parametrize(
    ("hf_dir", "stated", "hub_id", "name"),
    [
        ("/c/models--org--name.v2/snapshots/abc", None, "org/name.v2", "org/name.v2"),
        ("/home/me/model", "org/name", "org/name", "org/name"),
        ("/home/me/model", "/home/you/secret", "", "model"),
        ("/home/me/model", "org/name\nlicense: mit", "", "model"),
        ("/home/me/model", ["org/name"], "", "model"),
        ("/home/me/model", None, "", "model"),
    ],
)
def test_the_base_is_an_id_of_the_hub_or_no_path_of_a_machine(tmp_path, hf_dir, stated, hub_id, name):
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": stated} if stated else {}))
    assert base_of(hf_dir, tmp_path) == Base(name, hub_id, {})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\nhi", {"license": "apache-2.0"}),
        ("---\r\nlicense: other\r\nlicense_name: own\r\nlicense_link: L\r\n---\r\n", None),
        ("---\nlicense: [mit, x]\n---\n", {}),
        ("---\nlicense_name: own\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system ['false']\n---\n", {}),
        ("---\nlicense: {a: &a [x], b: *a, c: *c}\n---\n", {}),
        ("---\n" + "[" * 5000 + "\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("license: mit\n", {}),
        ("", {}),
    ],
)
def test_the_license_is_taken_from_front_matter_only(tmp_path, text, found):
    (tmp_path / "README.md").write_bytes(text.encode())
    expected = {"license": "other", "license_name": "own", "license_link": "L"} if found is None else found
    assert base_of("/m", tmp_path).license == expected
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert base_of("/m", tmp_path).license == {}


def exported(run, name="model"):
    run.export_path.mkdir(exist_ok=True)
    (run.export_path / "config.json").write_text(name)
    admit_export(run, run.export_path)


def test_a_card_is_written_anew_until_somebody_edits_it(tmp_path, caplog):
    run = open_run(tmp_path, Config())
    exported(run)
    card = run.export_path / "README.md"
    for text in ("one\n", "two\n"):
        write_card(run, text)
        assert card.read_text().startswith(text) and is_signed(card)
        require_own_export(run)
    assert caplog.records == []
    mine = card.read_text().replace("two", "two, and mine")
    card.write_text(mine)
    write_card(run, "three\n")
    assert card.read_text() == mine and "is kept" in caplog.text
    with pytest.raises(RunError, match="is not what this run wrote"):
        require_own_export(run)


@pytest.mark.parametrize(
    "change", [lambda t: t + "x", lambda t: "x" + t, lambda t: t[:-40] + "\n", lambda t: "", lambda t: t.upper()]
)
def test_any_change_of_a_signed_file_shows(tmp_path, change):
    path = tmp_path / "README.md"
    path.write_text(signed("text\n"))
    assert is_signed(path)
    path.write_text(change(signed("text\n")))
    assert not is_signed(path) and not is_signed(tmp_path) and not is_signed(tmp_path / "none")
    link = tmp_path / "link"
    path.write_text(signed("text\n"))
    link.symlink_to(path)
    assert not is_signed(link)
