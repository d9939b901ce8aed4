"""Texts, tokenizers and batches for language models.

Read `corpora` first, and `own_text` for a text of one's own; `vocabulary`, `byte_ids` and `byte_pair` turn text into
tokens, `batching` turns tokens into batches; `published` lists the data sets that `equilibria data` fetches.
"""

from equilibria.data.batching import Batches, OrderedBatches, SequenceBatches
from equilibria.data.byte_ids import Bytes
from equilibria.data.byte_pair import BytePair
from equilibria.data.cache import cache_folder
from equilibria.data.copy_memory import copy_memory
from equilibria.data.corpora import load_corpus, published_corpus, python_docs, word_corpus
from equilibria.data.corpus import Corpus, SequenceSplit, Split
from equilibria.data.options import TextOptions
from equilibria.data.own_text import text_corpus
from equilibria.data.python_docs import Texts, python_docs_texts
from equilibria.data.tokenizer import Tokenizer, load_tokenizer, read_tokenizer
from equilibria.data.variable_length import VariableLengthBatches
from equilibria.data.vocabulary import Vocabulary
from equilibria.data.word_ids import ORIGINAL_STYLES, WordStyle

__all__ = [
    "ORIGINAL_STYLES",
    "Batches",
    "BytePair",
    "Bytes",
    "Corpus",
    "OrderedBatches",
    "SequenceBatches",
    "SequenceSplit",
    "Split",
    "TextOptions",
    "Texts",
    "Tokenizer",
    "VariableLengthBatches",
    "Vocabulary",
    "WordStyle",
    "cache_folder",
    "copy_memory",
    "load_corpus",
    "load_tokenizer",
    "published_corpus",
    "python_docs",
    "python_docs_texts",
    "read_tokenizer",
    "text_corpus",
    "word_corpus",
]
