"""Files of a corpus: what a path, a directory with links and a pattern name, and what is left out in one line of the log."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from dsa_jax.checkpoints.hf.locate import locate_checkpoint
from dsa_jax.config import Config, ConfigError, TextConfig
from dsa_jax.config.checks import user_path
from dsa_jax.data import ByteTokenizer, load_corpus
from dsa_jax.data.found_files import find_files
from dsa_jax.run.directory import open_run


def texts(path, **fields):
    """The documents of a corpus, sorted."""
    corpus = load_corpus(TextConfig(path=str(path), **{"held_out_fraction": 0.5, **fields}), ByteTokenizer())
    documents = [d for side in (corpus.train, corpus.held_out) for d in np.split(side.tokens, side.starts[1:])]
    return sorted(bytes(document[:-1].tolist()).decode() for document in documents)


def write(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"the text of {name}")
    return [f"the text of {name}" for name in names]


def names_of(path, *, but=".csv"):
    return [file.name for file in find_files(str(path), lambda name: "of that kind" if name.endswith(but) else "")]


def test_a_linked_directory_is_read_after_what_is_there(tmp_path):
    other = write(tmp_path / "elsewhere", *(f"{i:02d}.txt" for i in range(40)))
    own = write(tmp_path / "corpus", *(f"own{i}.txt" for i in range(5)))
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    assert texts(tmp_path / "corpus") == sorted(other + own)


def test_links_in_circles_and_twice_the_same_are_read_once(tmp_path, caplog):
    write(tmp_path / "corpus" / "z", "a.txt", "b.txt")
    (tmp_path / "corpus" / "a").symlink_to(tmp_path / "corpus" / "z")  # sorts before what it leads to
    (tmp_path / "corpus" / "z" / "up").symlink_to(tmp_path / "corpus")
    found = find_files(str(tmp_path / "corpus"), lambda _: "")
    assert [str(file.relative_to(tmp_path / "corpus")) for file in found] == ["z/a.txt", "z/b.txt"]
    assert "2 of a directory that is read already" in caplog.text


def test_a_link_within_a_linked_directory_is_followed(tmp_path):
    write(tmp_path / "one", "1.txt")
    write(tmp_path / "two", "2.txt")
    write(tmp_path / "corpus", "0.txt")
    (tmp_path / "corpus" / "one").symlink_to(tmp_path / "one")
    (tmp_path / "one" / "two").symlink_to(tmp_path / "two")
    (tmp_path / "corpus" / "file.txt").symlink_to(tmp_path / "two" / "2.txt")
    assert names_of(tmp_path / "corpus") == ["0.txt", "file.txt", "1.txt", "2.txt"]


def test_a_link_that_leads_nowhere_is_an_error(tmp_path):
    write(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(ConfigError, match=r"b\.txt cannot be read: No such file"):
        names_of(tmp_path)


def test_a_directory_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", str(top)))
        return iter(())

    monkeypatch.setattr("dsa_jax.data.found_files.os.walk", walk)
    with pytest.raises(ConfigError, match=r"the directory .* cannot be read: Permission denied"):
        names_of(tmp_path)


def test_what_is_left_out_is_named_with_its_number(tmp_path, caplog):
    write(tmp_path, "a.txt", "b.csv", "c.csv", ".hidden.txt")
    write(tmp_path / ".git", "d.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert names_of(tmp_path) == ["a.txt"]
    (line,) = caplog.messages
    assert "1 files are read, left out are 1 FIFO (pipe.txt), 2 hidden (.git), 2 of that kind (b.csv)" in line
    caplog.clear()
    assert names_of(tmp_path / "a.txt") == ["a.txt"] and not caplog.messages


def test_suffixes_of_any_case_and_others_by_name(tmp_path, caplog):
    (tmp_path / "a.JSONL").write_text('{"text": "one"}\n')
    (tmp_path / "b.TXT").write_text("two")
    (tmp_path / "c.Md").write_text("# three")
    np.save(tmp_path / "d.npy", np.frombuffer(b"four", np.uint8))
    (tmp_path / "d.npy").rename(tmp_path / "d.NPY")
    write(tmp_path, "e.pdf", "f.npy.gz", "g.gz", "LICENSE")
    assert texts(tmp_path) == ["# three", "four", "one", "two"]
    assert "2 .gz files (f.npy.gz), 1 .pdf files (e.pdf), 1 suffixless files (LICENSE)" in caplog.text


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero")], ids=["fifo", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make):
    for name in ("a.txt", "b.jsonl", "c.npy"):
        make(tmp_path / name)
        with pytest.raises(ConfigError, match=r"which is a (FIFO|character device); expected a regular file or a directory"):
            texts(tmp_path / name)
    with pytest.raises(ConfigError, match="where no file is"):
        texts(tmp_path)


def test_patterns_and_the_home_directory(tmp_path, monkeypatch):
    one = write(tmp_path / "one", "a.txt", "b.md", "c.csv")
    two = write(tmp_path / "two" / "deep", "d.txt", "e.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/one") == texts(f"{tmp_path}/one/*") == sorted(one[:2])
    assert texts("~/**/*.txt") == sorted([one[0], *two])
    assert texts("~/*") == sorted([*one[:2], *two])
    for nowhere in ("~/nowhere/*.txt", "~/nowhere"):
        with pytest.raises(ConfigError, match=r"does not exist\. Expected a file, a directory or a glob pattern"):
            texts(nowhere)


def test_a_name_is_no_pattern_where_a_file_has_it(tmp_path):
    write(tmp_path, "a[1].txt", "a1.txt")
    assert names_of(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_files_of_runs_are_not_text(tmp_path, caplog):
    write(tmp_path, "a.txt")
    write(tmp_path / "runs" / "mine", "note.txt")
    before = names_of(tmp_path)
    for run in (tmp_path / "runs" / "mine", tmp_path):  # beside the text, and in one directory with it
        open_run(run, Config())
        for name in ("metrics.jsonl", "timing.jsonl"):
            (run / name).write_text('{"step": 1}\n')
        write(run / "hf", "merges.txt")
        write(run / "checkpoints" / "sparse" / "1", "b.txt")
    assert [name for name in names_of(tmp_path) if not name.endswith(".json")] == before == ["a.txt", "note.txt"]
    assert "8 of a run (checkpoints)" in caplog.text


@pytest.mark.parametrize("pattern", ["**/*", "**/*.txt", "*", "runs/*/*", "runs/mine/h*"])
def test_no_pattern_reaches_the_files_of_a_run(tmp_path, pattern):
    write(tmp_path, "a.txt")
    run = open_run(tmp_path / "runs" / "mine", Config()).path
    write(run, "note.txt")

    def found():
        try:
            return [file.name for file in find_files(str(tmp_path / pattern), lambda name: "" if ".txt" in name else "other")]
        except ConfigError:
            return []

    before = found()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    for folder in ("hf", "hf_source", "checkpoints/sparse/1"):
        write(run / folder, "merges.txt")
    assert found() == before


@pytest.mark.parametrize("content", ["{}", '{"model": 1}', "[" * 10**5, "not JSON", "[1]"])
def test_metrics_of_others_are_text(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in ("one", "two")))
    assert texts(tmp_path) == ["one", "two"]


def test_the_home_of_nobody_is_an_error():
    readers = {
        "data.text.path": lambda: find_files("~nobody-of-that-name/text", lambda name: ""),
        "the checkpoint": lambda: locate_checkpoint("~nobody-of-that-name/hf"),
        "--prompt_file": lambda: user_path("--prompt_file", "~nobody-of-that-name"),
    }
    for name, read in readers.items():
        with pytest.raises(ConfigError, match=f"{name} is '~nobody-of-that-name.* no home directory of that user is known"):
            read()
