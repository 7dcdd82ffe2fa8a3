import json
import sys
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from dsa_jax.config import ConfigError, DataConfig, TextConfig
from dsa_jax.data import ByteTokenizer, load_corpus, make_eval_data, make_train_data
from dsa_jax.data.packing import make_stream, pack_rows
from dsa_jax.data.record_files import ParquetFiles, open_records
from dsa_jax.data.streamed import StreamedCorpus, TextReader

KINDS = ("array_record", "parquet")
VOCAB = 640
END = ByteTokenizer.end_of_text_id


def texts(n=60):
    """Different ones, from 3 to 602 characters, and an empty one."""
    rng = np.random.default_rng(7)
    sizes = [*rng.integers(1, 60, n - 2).tolist(), 600]
    return ["", *(f"{i:02d}" + "".join(chr(97 + c) for c in rng.integers(0, 26, size)) for i, size in enumerate(sizes))]


def write_array_record(file, records):
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record if isinstance(record, bytes) else record.encode())
    writer.close()


def write(directory, kind, records):
    """Two files of unequal size."""
    directory.mkdir(exist_ok=True)
    for name, part in (("one", records[:25]), ("two", records[25:])):
        file = directory / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"number": list(range(len(part))), "text": part}), file, row_group_size=7)
        else:
            write_array_record(file, part)
    return directory


@pytest.fixture(scope="module", params=KINDS)
def corpus_dir(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("corpus") / request.param, request.param, texts())


def text_config(path, **fields):
    return TextConfig(path=str(path), source="grain", **{"held_out_fraction": 0.2, "open_documents": 3, **fields})


def train_data(path, *, seed=5, recall_fraction=0.5, **fields):
    return make_train_data(DataConfig(recall_fraction=recall_fraction, text=text_config(path, **fields)), seed, VOCAB)


def training_documents(corpus, seed, n_epochs=1):
    """Token ids of the training documents in their order, read one by one."""
    found = (corpus.documents(seed, held_out=False)[place][1] for place in range(n_epochs * corpus.n_documents))
    return [tokens for tokens in found if tokens.size]


def assert_same(got, want):
    for name, a, b in zip(got._fields, got, want, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def orders(records, seed, n_epochs=2):
    ordered, n = records.ordered(seed), sum(records.counts)
    return [[ordered[epoch * n + i] for i in range(n)] for epoch in range(n_epochs)]


def test_every_epoch_has_every_document_once_in_an_order_of_its_own(corpus_dir):
    records = open_records(str(corpus_dir), "text")
    assert records.counts == [25, 35]
    first, second = orders(records, 5)
    assert sorted(first) == sorted(second) == sorted(texts())
    assert len({tuple(order) for order in (first, second, texts(), orders(records, 6)[0])}) == 4
    assert orders(open_records(f"{corpus_dir}/*", "text"), 5) == [first, second]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string_view(),
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string(), ordered=True),
    ],
    ids=str,
)
def test_every_kind_of_string_column_is_read(tmp_path, kind):
    column = pa.array([*texts(), None, "twice", "twice"]).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=7)
    (first,) = orders(open_records(str(tmp_path), "text"), 5, n_epochs=1)
    assert sorted(first) == sorted([*texts(), "", "twice", "twice"])


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int8(), pa.int64()), pa.binary(), pa.list_(pa.string())], ids=str)
def test_other_columns_are_refused(tmp_path, kind):
    pq.write_table(pa.table({"text": pa.array([None], kind)}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"column 'text' of .*; expected string"):
        open_records(str(tmp_path), "text")


def test_links_patterns_and_the_home_directory_name_records_too(corpus_dir, tmp_path, monkeypatch, caplog):
    (tmp_path / "linked").symlink_to(corpus_dir)
    (tmp_path / "note.txt").write_text("a")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~", "~/l*", f"{tmp_path}/**/*"):
        records = open_records(path, "text")
        assert records.counts == [25, 35] and sum(records.counts) == 60
    assert "1 .txt files (note.txt)" in caplog.text


def test_a_corpus_that_moved_is_gone_on_with(corpus_dir, tmp_path):
    data = train_data(corpus_dir)
    data.batch(0, batch_size=8, seq_len=32)
    (tmp_path / "elsewhere").symlink_to(corpus_dir)
    other = train_data(tmp_path / "elsewhere")
    other.restore(data.state())
    assert_same(other.batch(1, batch_size=8, seq_len=32), data.batch(1, batch_size=8, seq_len=32))


def test_parquet_windows_hold_few_row_groups_and_mix_them(tmp_path):
    files = sorted(write(tmp_path / "corpus", "parquet", texts()).iterdir())
    records = ParquetFiles(files, "text", window_bytes=1000)
    first, second = orders(records, 5)
    assert sorted(first) == sorted(second) == sorted(texts()) and first != second
    assert len(records._windows) == 2 < len(records._plan(5, 0)[0])
    assert max(len(window) for window in records._plan(5, 0)[0]) > 1
    group_of = {text: (i < 25, (i if i < 25 else i - 25) // 7) for i, text in enumerate(texts())}
    changes = sum(group_of[a] != group_of[b] for a, b in pairwise(first))
    assert changes > 12  # 9 row groups, laid end to end, would change 8 times


def test_one_open_document_packs_as_the_reference_does(corpus_dir):
    corpus = StreamedCorpus(text_config(corpus_dir, open_documents=1), ByteTokenizer())
    stream = make_stream(training_documents(corpus, 5, n_epochs=2))
    reader = TextReader(corpus, 5)
    for step in range(12):
        assert_same(reader.rows(step, 4, 64), pack_rows(stream, np.arange(4) + 4 * step, 64))
    assert stream.tokens.size // 2 < 12 * 4 * 64  # into the second epoch


def test_rows_of_several_documents_hold_every_token_once(corpus_dir):
    corpus = StreamedCorpus(text_config(corpus_dir), ByteTokenizer())
    expected = training_documents(corpus, 5, n_epochs=3)
    reader = TextReader(corpus, 5)
    ids, targets, mask, segments = (np.concatenate(a) for a in zip(*(reader.rows(s, 4, 32) for s in range(20)), strict=True))
    complete, begun = [], []
    for stream in range(3):
        tokens = ids[stream::3].reshape(-1)
        *documents, last = np.split(tokens, np.flatnonzero(tokens == END) + 1)
        complete += documents
        begun += [last] if last.size else []
        # Every row but the stream's last: what follows the last token of a row opens the stream's next one.
        following = np.where(tokens[:-1] == END, 0, tokens[1:])
        np.testing.assert_array_equal(targets[stream::3].reshape(-1)[:-1], following)
    np.testing.assert_array_equal(mask, ids != END)
    np.testing.assert_array_equal(segments[:, 1:] - segments[:, :-1], ids[:, :-1] == END)
    assert (segments[:, 0] == 1).all()
    opened = sorted(document.tobytes() for document in expected[: len(complete) + len(begun)])
    whole = sorted(complete, key=lambda document: document.tobytes())
    rest = list(opened)
    for document in whole:
        rest.remove(document.astype(np.uint16).tobytes())
    for part in begun:
        rest.remove(next(each for each in rest if each.startswith(part.astype(np.uint16).tobytes())))
    assert rest == [] and len(whole) > len(training_documents(corpus, 5))


def test_a_state_goes_through_json_and_goes_on_with_the_same_rows(corpus_dir):
    data = train_data(corpus_dir)
    for step in range(4):
        data.batch(step, batch_size=8, seq_len=32)
    saved = json.loads(json.dumps(data.state()))
    other = train_data(corpus_dir)
    other.restore(saved)
    for step in range(4, 12):  # into the second epoch, over a change of both sizes
        sizes = {"batch_size": 8, "seq_len": 32} if step < 8 else {"batch_size": 10, "seq_len": 50}
        assert_same(other.batch(step, **sizes), data.batch(step, **sizes))
    assert other.state() == data.state() != saved


def test_checking_a_length_changes_nothing_and_steps_must_follow_each_other(corpus_dir):
    data = train_data(corpus_dir)
    before = data.state()
    data.check(batch_size=8, seq_len=32)
    assert data.state() == before
    with pytest.raises(ValueError, match=r"step is 3; expected 0"):
        data.batch(3, batch_size=8, seq_len=32)
    with pytest.raises(ConfigError, match="no position in the text"):
        data.restore(None)


def share(batch, process_index, process_count):
    """The rows that a process puts on its devices."""
    size = batch.input_ids.shape[0] // process_count
    return batch.input_ids[process_index * size : (process_index + 1) * size]


def test_processes_share_rows_and_may_become_more_at_a_checkpoint(corpus_dir):
    alone = train_data(corpus_dir, recall_fraction=0.0)
    expected = [alone.batch(step, batch_size=12, seq_len=32).input_ids for step in range(8)]
    two = [train_data(corpus_dir, recall_fraction=0.0) for _ in range(2)]
    for step in range(4):
        parts = [share(data.batch(step, batch_size=12, seq_len=32), i, 2) for i, data in enumerate(two)]
        np.testing.assert_array_equal(np.concatenate(parts), expected[step])
    assert two[0].state() == two[1].state()
    three = [train_data(corpus_dir, recall_fraction=0.0) for _ in range(3)]
    for data in three:
        data.restore(two[0].state())
    for step in range(4, 8):
        parts = [share(data.batch(step, batch_size=12, seq_len=32), i, 3) for i, data in enumerate(three)]
        np.testing.assert_array_equal(np.concatenate(parts), expected[step])


def test_the_same_documents_are_held_out_as_from_memory(corpus_dir, tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()), encoding="utf-8")
    memory = load_corpus(TextConfig(path=str(file), held_out_fraction=0.2), ByteTokenizer())
    assert memory.provenance["split_unit"] == "document"
    config = DataConfig(recall_fraction=0.0, text=text_config(corpus_dir))
    held_out = make_eval_data(config, 1, VOCAB).text.held_out
    training = training_documents(StreamedCorpus(config.text, ByteTokenizer()), 5)

    def documents(stream):
        return sorted(part.tobytes() for part in np.split(stream.tokens, stream.starts[1:]))

    assert documents(held_out) == documents(memory.held_out)
    assert sorted(document.tobytes() for document in training) == documents(memory.train)


def test_evaluation_takes_what_it_needs_whatever_the_seed(corpus_dir):
    config = DataConfig(recall_fraction=0.0, text=text_config(corpus_dir, held_out_tokens=50))
    one, two = make_eval_data(config, 1, VOCAB), make_eval_data(config, 2, VOCAB)
    assert 50 <= one.text.held_out.tokens.size < 50 + 602
    for a, b in zip(one.text_batches(2, 16, 2), two.text_batches(2, 16, 2), strict=True):
        assert_same(a, b)
    assert one.describe()["text"]["n_records"] == 60
    with pytest.raises(ConfigError, match=r"held-out text has .*data\.text\.held_out_tokens"):
        one.text_batches(2, 10_000, 2)


def test_other_files_are_not_gone_on_with(tmp_path):
    state = train_data(write(tmp_path / "corpus", "array_record", texts())).state()
    other = train_data(write(tmp_path / "corpus", "array_record", texts(61)))
    with pytest.raises(ConfigError, match="holds other files than when the checkpoint was written"):
        other.restore(state)


def bad_column(directory):
    pq.write_table(pa.table({"body": ["a"], "number": [1]}), directory / "bad.parquet")


def numbers(directory):
    pq.write_table(pa.table({"text": [1, 2]}), directory / "bad.parquet")


def parquet_bytes(directory, *contents):
    """Parquet does not check that strings are UTF-8."""
    raw = pa.array(contents, pa.binary()).buffers()
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(len(contents), raw[1], raw[2])}), directory / "bad.parquet")


def cut(directory, kind):
    file = write(directory, kind, texts()) / f"two.{kind}"
    file.rename(directory / f"bad.{kind}")
    (directory / f"bad.{kind}").write_bytes((directory / f"bad.{kind}").read_bytes()[:-100])


def both_kinds(directory):
    for kind in KINDS:
        write(directory, kind, texts())


BROKEN = {
    "nothing there": (lambda d: (d / "note.txt").write_text("a"), "a directory without a .array_record or .parquet file"),
    "both kinds": (both_kinds, "both .array_record and .parquet"),
    "no column": (bad_column, r"bad\.parquet has no column 'text' but body, number"),
    "column of numbers": (numbers, r"bad\.parquet has a column 'text' of int64"),
    "empty parquet": (lambda d: pq.write_table(pa.table({"text": pa.array([], pa.string())}), d / "bad.parquet"), "is empty"),
    "empty array_record": (lambda d: write_array_record(d / "bad.array_record", []), r"bad\.array_record is empty"),
    "no byte in parquet": (lambda d: (d / "bad.parquet").touch(), r"bad\.parquet cannot be read"),
    "no byte in array_record": (lambda d: (d / "bad.array_record").touch(), r"bad\.array_record cannot be read"),
    "cut parquet": (lambda d: cut(d, "parquet"), r"bad\.parquet cannot be read"),
    "cut array_record": (lambda d: cut(d, "array_record"), r"bad\.array_record cannot be read"),
    "bytes in parquet": (lambda d: parquet_bytes(d, b"\xff"), r"bad\.parquet, record 0 is not UTF-8"),
    "later bytes in parquet": (lambda d: parquet_bytes(d, b"a", b"b\xff"), r"bad\.parquet, record 1 is not UTF-8: .* byte 1"),
    "bytes in array_record": (lambda d: write_array_record(d / "bad.array_record", [b"\xff"]), "record 0 is not UTF-8"),
    "later bytes in array_record": (lambda d: write_array_record(d / "bad.array_record", ["a", b"\xff"]), "record 1 is not"),
    "no text": (lambda d: write_array_record(d / "bad.array_record", ["", ""]), "none of the 2 documents"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_corpora_are_refused_before_training(name, tmp_path):
    make, message = BROKEN[name]
    make(tmp_path)
    config = DataConfig(recall_fraction=0.0, text=text_config(tmp_path))
    with pytest.raises(ConfigError, match=message):
        make_eval_data(config, 0, VOCAB)


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("", {}, "data.text.path is empty"),
        ("nowhere/*.parquet", {}, "does not exist"),
        (__file__, {}, "expected one, since data.text.source is 'grain'"),
        (__file__, {"max_tokens": 5}, "data.text.max_tokens is 5"),
        (__file__, {"open_documents": 0}, "data.text.open_documents"),
        (__file__, {"source": "parquet"}, "data.text.source"),
    ],
)
def test_settings_that_cannot_work_are_refused(path, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_train_data(DataConfig(text=TextConfig(**{"path": path, "source": "grain", **fields})), 0, VOCAB)


@pytest.mark.parametrize(("kind", "package"), [("array_record", "grain"), ("parquet", "grain"), ("parquet", "pyarrow.parquet")])
def test_a_missing_package_names_the_command(kind, package, tmp_path, monkeypatch):
    write(tmp_path, kind, texts())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'dsa-jax\[data\]'"):
        train_data(tmp_path)


def test_a_corpus_that_is_all_held_out_cannot_be_trained_on(corpus_dir):
    with pytest.raises(ConfigError, match=r"none of the 60 documents .* is training text.* Lower data\.text"):
        train_data(corpus_dir, held_out_fraction=0.9999)
