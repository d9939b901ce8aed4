"""Texts to train language models on, each split into train, valid and test and turned into tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from equilibria.data.byte_pair import BytePair
from equilibria.data.copy_memory import DELAY, copy_memory
from equilibria.data.corpus import Corpus, Split
from equilibria.data.python_docs import Texts, python_docs_texts
from equilibria.data.vocabulary import Vocabulary
from equilibria.solution import UserError

VOCAB_SIZE = 2048
"""Tokens of a byte-pair vocabulary unless told otherwise: about 3 bytes of English per token."""

WIKITEXT2_SOURCE = "they are in https://wikitext.smerity.com/wikitext-2-v1.zip"
PENN_TREEBANK_SOURCE = "they are in simple-examples/data of http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
TEXT_SOURCE = "put your own text into it as UTF-8, some 90 %, 5 % and 5 % of it in the three files"


def load_corpus(
    name: str, data_dir: str | Path | None = None, *, vocab_size: int | None = None, delay: int | None = None
) -> Corpus:
    """The corpus called `name`: 'python-docs', 'wikitext-2', 'penn-treebank', 'copy-memory' or 'text'.

    `data_dir` is the folder that holds the files of those that have files; `vocab_size` the number of tokens of the
    byte-pair vocabulary of 'python-docs' and 'text' (default 2048); `delay` the T of 'copy-memory' (default 400).
    Raises UserError for a name, a folder or a combination of these that cannot be used.

        load_corpus("python-docs", vocab_size=512)
    """
    word_level = {"wikitext-2": wikitext2, "penn-treebank": penn_treebank}
    if name not in ("python-docs", "text", "copy-memory", *word_level):
        raise UserError(f"there is no corpus {name!r}; choose python-docs, wikitext-2, penn-treebank, copy-memory or text")
    if delay is not None and name != "copy-memory":
        raise UserError(f"{name} has no delay, which is an option of copy-memory; leave the delay out (None)")
    if name in ("python-docs", "copy-memory") and data_dir is not None:
        whence = "read from the Python installation" if name == "python-docs" else "generated"
        raise UserError(
            f"{name} is {whence}, not read from {data_dir}; leave the data folder out, "
            "or choose the corpus text to read your own"
        )
    if name == "python-docs":
        return python_docs(VOCAB_SIZE if vocab_size is None else vocab_size)
    if name == "copy-memory":
        if vocab_size is not None:
            raise UserError("copy-memory has ten symbols; leave the vocabulary size out (None)")
        return copy_memory(DELAY if delay is None else delay)
    if data_dir is None:
        raise UserError(f"the corpus {name} is read from a folder; name the folder with --data-dir")
    if name == "text":
        return text_folder(data_dir, VOCAB_SIZE if vocab_size is None else vocab_size)
    if vocab_size is not None:
        raise UserError(f"{name} is word level, and its vocabulary is all its words; leave the vocabulary size out (None)")
    return word_level[name](data_dir)


def wikitext2(data_dir: str | Path) -> Corpus:
    """WikiText-2, word level (Merity et al., ICLR 2017): 2,088,628 / 217,646 / 245,569 tokens, 33,278 words.

    `data_dir` holds wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, or a folder wikitext-2 with them.
    Raises UserError if they are not there, are empty or are not UTF-8.

        wikitext2("data/wikitext-2").train.tokens
    """
    names = ["wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"]
    return _word_corpus("wikitext-2", _find(data_dir, "wikitext-2", names, WIKITEXT2_SOURCE))


def penn_treebank(data_dir: str | Path) -> Corpus:
    """The Penn Treebank, word level, as prepared by Mikolov: 929,589 / 73,760 / 82,430 tokens, 10,000 words.

    `data_dir` holds ptb.train.txt, ptb.valid.txt and ptb.test.txt, or a folder penn-treebank with them.
    Raises UserError if they are not there, are empty or are not UTF-8.

        penn_treebank("data/penn-treebank").train.tokens
    """
    names = ["ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"]
    return _word_corpus("penn-treebank", _find(data_dir, "penn-treebank", names, PENN_TREEBANK_SOURCE))


def text_folder(data_dir: str | Path, vocab_size: int = VOCAB_SIZE) -> Corpus:
    """A text of one's own: train.txt, valid.txt and test.txt in `data_dir`, as byte pairs learnt from train.txt.

    A short text gives fewer than `vocab_size` tokens; see `BytePair.train`. Raises UserError if a file is not there,
    is empty or is not UTF-8, or if `vocab_size` is below 256.

        text_folder("my-text", vocab_size=1024).test.bytes_per_token
    """
    paths = _find(data_dir, None, ["train.txt", "valid.txt", "test.txt"], TEXT_SOURCE)
    texts = Texts(*("".join(_lines(path)) for path in paths))
    return _byte_pair_corpus("text", texts, vocab_size)


def python_docs(vocab_size: int = VOCAB_SIZE) -> Corpus:
    """The documentation that Python itself carries, as byte pairs; nothing to download. See `python_docs_texts`.

    Raises UserError if the installation has no source of its standard library, or if `vocab_size` is below 256.

        python_docs(vocab_size=512).train.tokens
    """
    return _byte_pair_corpus("python-docs", python_docs_texts(), vocab_size)


def _byte_pair_corpus(name: str, texts: Texts, vocab_size: int) -> Corpus:
    try:
        tokenizer = BytePair.train(texts.train, vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    splits = (Split(tokenizer.encode_tensor(text), len(text.encode())) for text in texts)
    return Corpus(name, *splits, tokenizer=tokenizer, test_text=texts.test)


def _word_corpus(name: str, paths: list[Path]) -> Corpus:
    # From the train split alone: for WikiText and the Penn Treebank it has every word of the other two.
    vocabulary = Vocabulary.build(_lines(paths[0]))
    splits = (Split(vocabulary.encode_lines(_lines(path)), path.stat().st_size) for path in paths)
    return Corpus(name, *splits, tokenizer=vocabulary, test_text="".join(_lines(paths[2])))


def _find(data_dir: str | Path, subfolder: str | None, names: list[str], source: str) -> list[Path]:
    """Paths of the files `names` in `data_dir`, or else in its `subfolder`. Raises UserError if one is missing."""
    folder = Path(data_dir)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; name a folder that holds {', '.join(names)}: {source}")
    places = [folder] if subfolder is None else [folder, folder / subfolder]
    place = next((place for place in places if any((place / name).is_file() for name in names)), None)
    looked_in = " or ".join(map(str, places if place is None else [place]))
    missing = [name for name in names if place is None or not (place / name).is_file()]
    if place is None or missing:
        raise UserError(f"there is no {', '.join(missing)} in {looked_in}; name a folder that has all files: {source}")
    return [place / name for name in names]


def _lines(path: Path) -> Iterator[str]:
    """Lines of a file, with their newlines as they are. Raises UserError if it is not UTF-8 or has no text."""
    empty = True
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError:
                raise UserError(f"line {number} of {path} is not UTF-8; save the file in that encoding") from None
            empty = empty and not line.strip()
            yield line
    if empty:
        raise UserError(f"{path} is empty; put text into it")
