"""Training and evaluation data: synthetic tasks, packed text, and batches that mix them."""

from dsa_jax.data.batch import Batch
from dsa_jax.data.corpus import Corpus, load_corpus
from dsa_jax.data.mixture import EvalData, TrainData, make_data, make_eval_data, make_train_data
from dsa_jax.data.tasks.recall import RecallTask, recall_rows
from dsa_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "EvalData",
    "JsonTokenizer",
    "RecallTask",
    "Tokenizer",
    "TrainData",
    "load_corpus",
    "load_tokenizer",
    "make_data",
    "make_eval_data",
    "make_train_data",
    "recall_rows",
]
