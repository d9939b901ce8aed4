"""Texts, tokenizers and batches for language models.

Read `corpora` first; `vocabulary` and `byte_pair` turn text into tokens, `batching` turns tokens into batches.
"""

from equilibria.data.batching import OrderedBatches
from equilibria.data.byte_pair import BytePair
from equilibria.data.corpora import Corpus, Split, load_corpus, penn_treebank, python_docs, text_folder, wikitext2
from equilibria.data.python_docs import Texts, python_docs_texts
from equilibria.data.tokenizer import Tokenizer, load_tokenizer
from equilibria.data.vocabulary import Vocabulary

__all__ = [
    "BytePair",
    "Corpus",
    "OrderedBatches",
    "Split",
    "Texts",
    "Tokenizer",
    "Vocabulary",
    "load_corpus",
    "load_tokenizer",
    "penn_treebank",
    "python_docs",
    "python_docs_texts",
    "text_folder",
    "wikitext2",
]
