"""Streamed text: rows packed from an endless shuffled order of documents, with a position that is checkpointed.

Several documents are open at once. Row r continues open document r modulo their number, and at its end opens the next of the
order. So the rows of a batch come from several documents, however long these are, every document is read once per epoch, and
the position is a few integers that depend on no batch size, row length or number of processes.
"""

import os
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt

from dsa_jax.config import ConfigError, TextConfig
from dsa_jax.data.batch import Batch, padding_rows, stack_rows
from dsa_jax.data.corpus import Corpus
from dsa_jax.data.encoding import encode_document
from dsa_jax.data.packing import TokenStream, make_stream, pack_rows
from dsa_jax.data.record_files import fingerprint, import_grain, open_records
from dsa_jax.data.split import digest, is_held_out
from dsa_jax.data.tokenizer import Tokenizer, token_dtype

_PREFETCHED = 64  # documents
_HELD_OUT_SEED = 0  # of the order in which held-out documents are searched, the same in every run


class StreamedCorpus:
    """Record files, tokenized and split by a hash of their content as they are read."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.records = open_records(config.path, config.column)
        self.n_documents = sum(self.records.counts)
        self.fingerprint = fingerprint(self.records)
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer)

    def documents(self, seed: int, *, held_out: bool) -> Any:
        """An endless `grain.MapDataset` of (place in the order, token ids), without ids for a document of the other split."""

        def tokens(place: int, text: str) -> tuple[int, UInt[np.ndarray, " N"]]:
            ids = encode_document(self._tokenizer, text).astype(self._dtype)
            if not ids.size:
                return place, ids
            return place, ids if is_held_out(digest(ids), self.config.held_out_fraction) == held_out else ids[:0]

        return self.records.ordered(seed).map_with_index(tokens)

    def describe(self) -> dict[str, Any]:
        """Provenance, for result files; `sha256` covers the files' names and sizes, not their content."""
        return {
            "source": self.config.path,
            "reader": "grain",
            "tokenizer": self._tokenizer.name,
            "sha256": self.fingerprint,
            "split_unit": "document",
            "n_files": len(self.records.files),
            "n_records": self.n_documents,
        }

    def held_out(self) -> Corpus:
        """The first held-out documents of a fixed order, until they have `held_out_tokens`.

        Raises:
            ConfigError: if no document is held out.
        """
        found, n_tokens = [], 0
        one_epoch = self.documents(_HELD_OUT_SEED, held_out=True)[: self.n_documents]
        with closing(_prefetched(one_epoch)) as documents:
            for _, tokens in documents:
                if tokens.size:
                    found.append(tokens)
                    n_tokens += tokens.size
                if n_tokens >= self.config.held_out_tokens:
                    break
        if not found:
            raise self._no_document("held-out", "Raise")
        return Corpus(None, make_stream(found), self.describe())

    def training_documents(self, seed: int) -> Any:
        """`documents` of the training split.

        Raises:
            ConfigError: if all are empty or held out.
        """
        documents = self.documents(seed, held_out=False)
        if not any(documents[place][1].size for place in range(self.n_documents)):
            raise self._no_document("training", "Lower")
        return documents

    def _no_document(self, side: str, change: str) -> ConfigError:
        return ConfigError(
            f"none of the {self.n_documents} documents of data.text.path ({self.config.path!r}) is {side} text: they are empty "
            f"or on the other side of the split. {change} data.text.held_out_fraction ({self.config.held_out_fraction}), or "
            "use more documents."
        )


@dataclass
class _Open:
    """An open document; place -1 before the first."""

    place: int = -1
    used: int = 0  # tokens
    tokens: UInt[np.ndarray, " N"] = field(default_factory=lambda: np.zeros(0, np.uint16))


class TextReader:
    """Training rows of a `StreamedCorpus`, read step by step.

    Raises:
        ConfigError: at construction, if there is no training document.
    """

    def __init__(self, corpus: StreamedCorpus, seed: int) -> None:
        self._corpus = corpus
        self._seed = seed
        self._documents = corpus.training_documents(seed)
        self._iterator = _prefetched(self._documents)
        self._step = 0
        self._row = 0
        self._open = [_Open() for _ in range(corpus.config.open_documents)]

    def describe(self) -> dict[str, Any]:
        """Provenance, for result files."""
        return self._corpus.describe()

    def rows(self, step: int, n_rows: int, seq_len: int) -> Batch:
        """The next `n_rows` rows, packed as by `packing.pack_rows`. No row is padded: epochs follow each other without a gap.

        Raises:
            ValueError: if `step` does not follow the one before, or the one of the restored state.
            ConfigError: for a file that cannot be read, or a record that is not UTF-8.
        """
        if step != self._step:
            raise ValueError(
                f"batch: step is {step}; expected {self._step}, since text is read in order where data.text.source is 'grain'. "
                "Restore the state of another step to go there."
            )
        self._step += 1
        numbers = range(self._row, self._row + n_rows)
        self._row += n_rows
        rows = [self._pack(self._open[row % len(self._open)], seq_len) for row in numbers]
        return stack_rows(rows) if rows else padding_rows(0, seq_len)

    def state(self) -> dict[str, Any]:
        """The position, as JSON values: Grain's in the order of documents, and that of every open document."""
        return {
            "corpus": self._corpus.fingerprint,
            "step": self._step,
            "row": self._row,
            "iterator": self._iterator.get_state(),
            "open": [[document.place, document.used] for document in self._open],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; the open documents are read again.

        Raises:
            ConfigError: if the files are not those it was taken from.
        """
        if state["corpus"] != self._corpus.fingerprint:
            raise ConfigError(
                f"data.text.path is {self._corpus.config.path!r} and holds other files than when the checkpoint was written: "
                "in name, size or number of documents. Expected the same, for its position in them to mean anything."
            )
        self._step, self._row = state["step"], state["row"]
        self._iterator.set_state(state["iterator"])
        self._open = [_Open() if place < 0 else _Open(place, used, self._documents[place][1]) for place, used in state["open"]]

    def fresh(self) -> "TextReader":
        """Another reader at the beginning of the same text."""
        return TextReader(self._corpus, self._seed)

    def _pack(self, document: _Open, seq_len: int) -> Batch:
        pieces: list[UInt[np.ndarray, " _"]] = []
        starts: list[int] = []
        n_tokens = 0
        while n_tokens < seq_len:
            while document.used == document.tokens.size:
                document.place, document.tokens = next(self._iterator)
                document.used = 0
            # One token more than fits: the target of the last one.
            piece = document.tokens[document.used : document.used + seq_len - n_tokens + 1]
            taken = min(piece.size, seq_len - n_tokens)
            pieces.append(piece)
            starts.append(n_tokens)
            document.used += taken
            n_tokens += taken
        return pack_rows(TokenStream(np.concatenate(pieces), np.array(starts, np.int64)), np.zeros(1, np.int64), seq_len)


def _prefetched(documents: Any) -> Any:
    """A `grain.DatasetIterator` whose threads read and tokenize the next documents."""
    n_threads = min(_PREFETCHED, os.cpu_count() or 1)
    return iter(documents.to_iter_dataset(import_grain().ReadOptions(num_threads=n_threads, prefetch_buffer_size=_PREFETCHED)))
