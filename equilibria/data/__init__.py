"""Texts, tokenizers and batches for language models.

Read `corpora` first; `vocabulary` and `byte_pair` turn text into tokens, `batching` turns tokens into batches.
"""

from equilibria.data.batching import Batches, OrderedBatches, SequenceBatches
from equilibria.data.byte_pair import BytePair
from equilibria.data.copy_memory import copy_memory
from equilibria.data.corpora import load_corpus, penn_treebank, python_docs, text_folder, wikitext2
from equilibria.data.corpus import Corpus, SequenceSplit, Split
from equilibria.data.python_docs import Texts, python_docs_texts
from equilibria.data.tokenizer import Tokenizer, load_tokenizer
from equilibria.data.vocabulary import Vocabulary

__all__ = [
    "Batches",
    "BytePair",
    "Corpus",
    "OrderedBatches",
    "SequenceBatches",
    "SequenceSplit",
    "Split",
    "Texts",
    "Tokenizer",
    "Vocabulary",
    "copy_memory",
    "load_corpus",
    "load_tokenizer",
    "penn_treebank",
    "python_docs",
    "python_docs_texts",
    "text_folder",
    "wikitext2",
]
