"""A tokenizer as its files describe it: tokens declared beside it, begin of text, control tokens, and settings to ignore."""

import json

import pytest

from dsa_jax.config import ConfigError, DataConfig, TextConfig
from dsa_jax.data import load_tokenizer
from dsa_jax.data.documents import user_documents
from dsa_jax.data.encoding import encode_documents
from dsa_jax.data.mixture import make_eval_data
from dsa_jax.data.streamed import StreamedCorpus
from dsa_jax.data.tokenizer import JsonTokenizer

TURN_END = "<|turn_end|>"
BOS_BEFORE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def added(token, content):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, "special": True} | flags


def write(folder, n_words=41, beside=None, **parts):
    """A tokenizer.json with <unk>, <s>, </s> and the words w0, w1, ... from id 3 on, and `beside` it files by name."""
    pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(n_words))]
    content = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder")) | {
        "version": "1.0",
        "added_tokens": [added(1, "<s>"), added(2, "</s>")],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {name: i for i, name in enumerate(names)}, "unk_token": "<unk>"},
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content | parts))
    for name, settings in (beside or {}).items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
    return str(folder)


def truncation(**changes):
    return {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0} | changes


def padding(**changes):
    plain = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    return plain | {"pad_token": "<unk>"} | changes


@pytest.mark.parametrize(
    "limits", [truncation(), truncation(direction="Left", stride=8), truncation(max_length=1)], ids=["32", "left-stride", "1"]
)
def test_truncation_of_the_file_loses_no_text(tmp_path, limits):
    path = write(tmp_path / "words", truncation=limits)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(8):
        (text / f"{i}.txt").write_text(f"w{i} " + "w9 " * 5000)
    tokenizer = load_tokenizer(path)
    assert sum(document.size for document in encode_documents(tokenizer, user_documents(str(text), tokenizer))) == 40_016
    assert tokenizer.encode_prompt("w1 " * 5001).size == 5001


@pytest.mark.parametrize(
    "pad", [padding(), padding(direction="Left"), padding(strategy="BatchLongest", pad_to_multiple_of=16)],
    ids=["fixed", "left", "multiple"],
)  # fmt: skip
def test_padding_of_the_file_adds_none(tmp_path, pad):
    tokenizer = load_tokenizer(write(tmp_path, padding=pad))
    assert tokenizer.encode("w1 w2").tolist() == [4, 5] == tokenizer.encode_prompt("w1 w2").tolist()


def test_dropout_of_merges_does_not_vary_the_tokens(tmp_path):
    model = {"type": "BPE", "dropout": 0.5, "vocab": {"a": 0, "b": 1, "ab": 2, "</s>": 3}, "merges": [["a", "b"]]}
    tokenizer = load_tokenizer(write(tmp_path, model=model, added_tokens=[]))
    assert tokenizer.encode("ab" * 40).tolist() == [2] * 40


DECODER = {"44": {"content": TURN_END, "special": True}}
DECLARED = {
    "decoder": {"tokenizer_config": {"added_tokens_decoder": DECODER, "eos_token": TURN_END}},
    "decoder-and-map": {
        "tokenizer_config": {"added_tokens_decoder": DECODER},
        "special_tokens_map": {"eos_token": {"content": TURN_END, "lstrip": False}},
    },
    "map-alone": {"special_tokens_map": {"eos_token": {"content": TURN_END}}},
    "listed": {"special_tokens_map": {"eos_token": TURN_END, "additional_special_tokens": [TURN_END]}},
    "listed-by-name": {"tokenizer_config": {"eos_token": TURN_END, "extra_special_tokens": {"turn": TURN_END}}},
    "added_tokens": {"added_tokens": {TURN_END: 44}, "tokenizer_config": {"eos_token": TURN_END}},
}


@pytest.mark.parametrize("beside", DECLARED.values(), ids=DECLARED)
def test_tokens_and_end_token_that_stand_beside_the_file(tmp_path, beside):
    tokenizer = load_tokenizer(write(tmp_path, beside=beside))
    assert tokenizer.encode(f"w2 {TURN_END} w3").tolist() == [5, 44, 6]
    assert (tokenizer.end_of_text_id, tokenizer.vocab_size) == (44, 45)
    assert tokenizer.decode([5, 44, 6]) == "w2 w3"
    assert tokenizer.decode([5, 44, 6], control_tokens=True) == f"w2 {TURN_END} w3"


def test_an_end_token_of_the_vocabulary_that_only_a_role_marks(tmp_path):
    """The id stands in the model's vocabulary, but no list of added tokens says that it is one token of a text."""
    words = {"<unk>": 0, TURN_END: 1, "w": 2}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    beside = {"special_tokens_map": {"eos_token": TURN_END}}
    tokenizer = load_tokenizer(write(tmp_path, beside=beside, model=model, added_tokens=[]))
    assert tokenizer.encode(f"w {TURN_END} w").tolist() == [2, 1, 2] and tokenizer.decode([2, 1]) == "w"


def test_which_file_names_the_end_token(tmp_path):
    both = {"tokenizer_config": {"eos_token": "<s>"}, "special_tokens_map": {"eos_token": "</s>"}}
    assert load_tokenizer(write(tmp_path / "old", beside=both)).end_of_text_id == 2
    both["tokenizer_config"]["added_tokens_decoder"] = {}
    assert load_tokenizer(write(tmp_path / "new", beside=both)).end_of_text_id == 1
    both["tokenizer_config"]["eos_token"] = None
    assert load_tokenizer(write(tmp_path / "none", beside=both)).end_of_text_id == 2


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map"])
def test_an_end_token_that_does_not_exist_is_an_error(tmp_path, name):
    path = write(tmp_path, beside={name: {"eos_token": "<|nope|>"}})
    with pytest.raises(ConfigError, match=r"eos_token beside .* is '<\|nope\|>', which is none of its tokens"):
        load_tokenizer(path)


def test_an_id_that_the_tokenizer_cannot_give_is_left_out_with_a_warning(tmp_path, caplog):
    beside = {"tokenizer_config": {"added_tokens_decoder": {"50": {"content": "<far>", "special": True}}}}
    tokenizer = load_tokenizer(write(tmp_path / "gap", beside=beside))
    assert tokenizer.vocab_size == 44 and "'<far>' is left out: its id would be 44, not 50" in caplog.text
    beside = {"tokenizer_config": {"added_tokens_decoder": {"9": {"content": "</s>", "special": True}}}}
    assert load_tokenizer(write(tmp_path / "other", beside=beside)).end_of_text_id == 2
    assert "'</s>' has id 2, not 9" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "<a>"}}}, "added_tokens_decoder has 'x'"),
        ("tokenizer_config", {"added_tokens_decoder": {"44": 3}}, "added_tokens_decoder has '44'"),
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "added_tokens_decoder is a list"),
        ("added_tokens", {"<a>": "44"}, "has '<a>': '44'"),
        ("special_tokens_map", [], "expected a JSON object|not JSON"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, name, content, message):
    path = write(tmp_path, beside={name: content})
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(path)


def test_nesting_beyond_what_can_be_read_is_refused(tmp_path):
    path = write(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"expected a JSON object|not JSON"):
        load_tokenizer(path)


BEGINS = {
    "post-processor": {"post_processor": BOS_BEFORE},
    "setting": {"beside": {"tokenizer_config": {"add_bos_token": True, "bos_token": "<s>"}}},
    "both": {"post_processor": BOS_BEFORE, "beside": {"tokenizer_config": {"add_bos_token": True, "bos_token": "<s>"}}},
}


@pytest.mark.parametrize("parts", BEGINS.values(), ids=BEGINS)
@pytest.mark.parametrize("control_tokens", [False, True], ids=["plain", "control"])
def test_documents_and_prompts_begin_with_one_begin_of_text(tmp_path, parts, control_tokens):
    path = write(tmp_path / "words", **parts)
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps({"text": row}) for row in ("w2 w3", "<s>w2 w3", "", "<s> w2 w3")))
    tokenizer = load_tokenizer(path, control_tokens=control_tokens)
    assert [each.tolist() for each in encode_documents(tokenizer, user_documents(str(text), tokenizer))] == [[1, 5, 6, 2]] * 3
    assert tokenizer.encode_prompt("<s>w2 w3").tolist() == [1, 5, 6] and tokenizer.encode_prompt("").tolist() == [1]
    assert tokenizer.encode("w2 w3").tolist() == [5, 6]


def test_streamed_documents_begin_so_too(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["w2 w3", "<s>w2 w3"]}), tmp_path / "rows.parquet")
    tokenizer = load_tokenizer(write(tmp_path / "words", post_processor=BOS_BEFORE), control_tokens=False)
    corpus = StreamedCorpus(TextConfig(path=str(tmp_path / "rows.parquet"), source="grain"), tokenizer)
    sides = [corpus.documents(0, held_out=held_out)[:2] for held_out in (False, True)]
    assert [ids.tolist() for side in sides for _, ids in side if ids.size] == [[1, 5, 6, 2]] * 2


def test_no_begin_of_text_where_neither_asks_for_it(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, beside={"tokenizer_config": {"add_bos_token": False, "bos_token": "<s>"}}))
    assert tokenizer.encode_prompt("w2 w3").tolist() == [5, 6]


@pytest.mark.parametrize("name", [None, "<begin>"], ids=["unnamed", "unknown"])
def test_a_begin_of_text_to_add_must_be_a_token(tmp_path, name):
    path = write(tmp_path, beside={"tokenizer_config": {"add_bos_token": True, "bos_token": name}})
    with pytest.raises(ConfigError, match=f"bos_token is {name!r}; expected one of the tokens"):
        load_tokenizer(path)


def test_a_prefix_of_two_tokens_and_a_tokenizer_without_an_unknown_one(tmp_path):
    """Nothing that is not a word can be encoded, so the prefix is found from a word of the vocabulary."""
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("<s>", "</s>")] + BOS_BEFORE["single"][1:]
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("<s>", 1), ("</s>", 2))}
    before = BOS_BEFORE | {"single": single, "special_tokens": tokens}
    model = {"type": "WordLevel", "vocab": {"w2": 0, "<s>": 1, "</s>": 2}, "unk_token": "<none>"}
    tokenizer = load_tokenizer(write(tmp_path, model=model, post_processor=before))
    assert tokenizer.encode_prompt("w2").tolist() == [1, 2, 0] == tokenizer.encode_prompt("<s></s>w2").tolist()


@pytest.mark.parametrize("spelled", ["</s>", "<s>", TURN_END], ids=["end", "begin", "declared"])
def test_text_that_spells_a_control_token_stays_text_unless_asked(tmp_path, spelled):
    path = write(tmp_path / "words", beside=DECLARED["decoder"])
    file = tmp_path / "text.txt"
    file.write_text(f"w2 {spelled} w3")
    token = {"</s>": 2, "<s>": 1, TURN_END: 44}[spelled]
    config = DataConfig(recall_fraction=0.0, text=TextConfig(path=str(file), tokenizer=path, held_out_fraction=0.5))
    for config.text.control_tokens, expected in (False, [5, 0, 0, 0, 6, 44]), (True, [5, token, 6, 44]):
        text = make_eval_data(config, 0, 45).text
        assert sorted([*text.train.tokens, *text.held_out.tokens]) == sorted(expected)  # both parts of a document that is split
    assert JsonTokenizer(path).encode_prompt(f"w2 {spelled}").tolist() == [5, token]


PIECES = ["<unk>", "<s>", "</s>", "<", "/", "s", ">", "a", "s>", "</"]
MODELS = {
    # As those of T5, whose control pieces have the best score of all.
    "unigram": {"type": "Unigram", "unk_id": 0, "vocab": [[piece, 0.0 if piece in PIECES[:3] else -3.0] for piece in PIECES]},
    "merges": {
        "type": "BPE",
        "vocab": {piece: id for id, piece in enumerate(PIECES)},
        "merges": [["s", ">"], ["<", "/"], ["</", "s>"]],
        "unk_token": "<unk>",
    },
    "words": {"type": "WordLevel", "vocab": {piece: id for id, piece in enumerate(PIECES)}, "unk_token": "<unk>"},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", ["</s>", "a</s>a", "</s></s>", "<</s>>", "a<s></s>"])
def test_a_vocabulary_that_has_control_tokens_as_text_does_not_read_them(tmp_path, name, text):
    path = write(tmp_path / name, model=MODELS[name], pre_tokenizer=None)
    tokenizer = JsonTokenizer(path, control_tokens=False)
    for ids in (tokenizer.encode(text), *tokenizer.encode_pieces([text])):
        assert ids.size and not {1, 2} & {*ids.tolist()}
        if name != "words":
            assert "".join(PIECES[id] for id in ids) == text
    assert tokenizer.encode("?").tolist() == [0]  # the unknown token remains
    assert JsonTokenizer(path).encode("</s>").tolist() == [2]


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"44": {"content": "\ud800"}}}},
        {"special_tokens_map": {"eos_token": "a\udfff"}},
        {"tokenizer_config": {"extra_special_tokens": ["\udc80"]}},
        {"added_tokens": {"\ud800": 44}},
    ],
)
def test_half_of_a_surrogate_pair_is_no_token(tmp_path, beside):
    with pytest.raises(ConfigError, match="half of a surrogate pair"):
        JsonTokenizer(write(tmp_path / "words", beside=beside))


def test_a_padding_token_beyond_the_vocabulary_of_the_model_is_not_counted(tmp_path):
    pad = {"added_tokens": [added(1, "<s>"), added(2, "</s>"), added(44, "[PAD]")]}
    assert load_tokenizer(write(tmp_path / "alone", **pad)).vocab_size == 45
    tokenizer = load_tokenizer(write(tmp_path / "model", beside={"config": {"vocab_size": 44}}, **pad))
    assert tokenizer.vocab_size == 44 and tokenizer.encode("w2 w3").tolist() == [5, 6]
    with pytest.raises(ConfigError, match=r"'\[PAD\]', token 44 of .* no embedding; expected tokens below 44"):
        tokenizer.encode("w2 [PAD]")
    listed = {"config": {"vocab_size": 44}, "special_tokens_map": {"additional_special_tokens": ["<more>"]}}
    assert load_tokenizer(write(tmp_path / "listed", beside=listed)).vocab_size == 44
