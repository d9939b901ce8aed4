"""The corpora that language models are trained on, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from equilibria.data.byte_ids import ALL, Bytes, count_bytes
from equilibria.data.byte_pair import BytePair
from equilibria.data.cache import LARGE, cache_folder, numbered_words
from equilibria.data.copy_memory import DELAY, copy_memory
from equilibria.data.corpus import Corpus, Split
from equilibria.data.numbered_text import Note
from equilibria.data.options import TextOptions
from equilibria.data.own_text import VOCAB_SIZE, text_corpus
from equilibria.data.published import DATA_SETS, DataSet, find_data_set
from equilibria.data.python_docs import python_docs_texts
from equilibria.data.word_ids import ORIGINAL_STYLES, WordStyle, text_chunks
from equilibria.solution import UserError

CORPORA = ("python-docs", *DATA_SETS, "copy-memory", "text")
HUNDRED_MILLION = 100_000_000  # bytes of enwik8, and of text8
TEXT8_ALPHABET = b" abcdefghijklmnopqrstuvwxyz"
TEXT_FILES = ("train.txt", "valid.txt", "test.txt")


def load_corpus(
    name: str,
    data_dir: str | Path | None = None,
    *,
    vocab_size: int | None = None,
    delay: int | None = None,
    original_vocabulary: bool = False,
    text: TextOptions | None = None,
    note: Note = lambda line: None,
) -> Corpus:
    """The corpus called `name`, one of `CORPORA`.

    - 'wikitext-103', 'wikitext-2', 'penn-treebank', 'penn-treebank-char', 'enwik8', 'text8': published data sets, read
      from `data_dir`, or from where `equilibria data get` has put them. See `published_corpus`.
    - 'python-docs': the documentation that Python carries, as `vocab_size` byte pairs (default 2048).
    - 'text': a text of your own, from the files in `data_dir` or from a data set of Hugging Face, as `text` says. See
      `text_corpus`, which tells `note` what it found.
    - 'copy-memory': sequences with a `delay` of T positions (default 400). See `copy_memory`.

    `original_vocabulary` numbers the words of a published data set as the original DEQ code does, which a checkpoint
    of it needs. Raises UserError for a name, a folder or a combination of these that cannot be used.

        load_corpus("python-docs", vocab_size=512)
    """
    if name not in CORPORA:
        raise UserError(f"there is no corpus {name!r}; choose {', '.join(CORPORA[:-1])} or {CORPORA[-1]}")
    if delay is not None and name != "copy-memory":
        raise UserError(f"{name} has no delay, which is an option of copy-memory; leave the delay out (None)")
    if vocab_size is not None and name not in ("python-docs", "text"):
        raise UserError(f"the vocabulary of {name} is all its symbols; leave the vocabulary size out (None)")
    if original_vocabulary and name not in ORIGINAL_STYLES:
        raise UserError(f"the original code has no vocabulary of {name}; leave the option out (False)")
    if name != "text" and text not in (None, TextOptions()):
        raise UserError(f"the options of a text of your own are for the corpus text, not for {name}; leave them out")
    if name in ("python-docs", "copy-memory") and data_dir is not None:
        whence = "read from the Python installation" if name == "python-docs" else "generated"
        raise UserError(
            f"{name} is {whence}, not read from {data_dir}; leave the data folder out, "
            "or choose the corpus text to read your own"
        )
    if name == "python-docs":
        return python_docs(VOCAB_SIZE if vocab_size is None else vocab_size)
    if name == "copy-memory":
        return copy_memory(DELAY if delay is None else delay)
    if name == "text":
        return text_corpus(data_dir, text, vocab_size=vocab_size, note=note)
    return published_corpus(name, data_dir, original_vocabulary=original_vocabulary)


def published_corpus(name: str, data_dir: str | Path | None = None, *, original_vocabulary: bool = False) -> Corpus:
    """A published data set, in the splits and the units in which results on it are reported.

    | name | tokens of train / valid / test | symbols |
    | --- | --- | --- |
    | wikitext-103 | 103,227,021 / 217,646 / 245,569 | 267,735 words |
    | wikitext-2 | 2,088,628 / 217,646 / 245,569 | 33,278 words |
    | penn-treebank | 929,589 / 73,760 / 82,430 | 10,000 words |
    | penn-treebank-char | 5,017,482 / 393,042 / 442,423 | 50 characters, written apart: t h e _ c a t |
    | enwik8 | 90,000,000 / 5,000,000 / 5,000,000 | 256 bytes; a byte's id is its value |
    | text8 | 90,000,000 / 5,000,000 / 5,000,000 | 27: space, a to z |

    `data_dir` holds its files, or a folder called `name` with them; None is the cache, which `equilibria data get`
    fills. Files called train.txt, valid.txt and test.txt will do: so the original code's get_data.sh renames them.
    Words are counted in the train split, their case is kept, and `<eos>` ends every line. A word that train lacks
    raises UserError, as do files that are not there, are empty or are not UTF-8. A large text is kept as numbers in the
    cache (`numbered_words`).

    `original_vocabulary` reads the data set as the original code does (`ORIGINAL_STYLES`): all splits but those of
    WikiText-103 are counted together, and the Penn Treebank is put in lower case. The bytes of enwik8 and the letters
    of text8 are numbered by count; the newlines of enwik8, and the spaces at the ends of the splits of text8, are lost.
    Its files are ours, not the ones prepared for that code.

        published_corpus("wikitext-2", "data/wikitext-2").train.tokens
    """
    data_set = find_data_set(name)
    if original_vocabulary and name not in ORIGINAL_STYLES:
        raise UserError(f"the original code has no vocabulary of {name}; leave the option out (False)")
    paths = find_files(data_set, data_dir)
    if name in ("enwik8", "text8"):
        return _byte_corpus(name, paths[0], original_vocabulary)
    return word_corpus(name, paths, ORIGINAL_STYLES[name] if original_vocabulary else WordStyle())


def word_corpus(name: str, paths: Sequence[Path], style: WordStyle | None = None, *, large: int = LARGE) -> Corpus:
    """Three files of words, train first, as a corpus; `style` (default: `WordStyle()`) says what a word is.

    Texts of `large` bytes and more are kept as numbers in the cache. Raises UserError for a file that is empty or not
    UTF-8 and for a word that was not counted.

        word_corpus("mine", [Path("a.txt"), Path("b.txt"), Path("c.txt")], WordStyle(lower_case=True)).train.tokens
    """
    tokens, vocabulary = numbered_words(paths, WordStyle() if style is None else style, large=large)
    splits = (Split(ids, path.stat().st_size) for ids, path in zip(tokens, paths, strict=True))
    return Corpus(name, *splits, tokenizer=vocabulary, test_text="".join(text_chunks(paths[2])))


def python_docs(vocab_size: int = VOCAB_SIZE) -> Corpus:
    """The documentation that Python itself carries, as byte pairs; nothing to download. See `python_docs_texts`.

    Raises UserError if the installation has no source of its standard library, or if `vocab_size` is below 256.

        python_docs(vocab_size=512).train.tokens
    """
    texts = python_docs_texts()
    try:
        tokenizer = BytePair.train(texts.train, vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    splits = (Split(tokenizer.encode_tensor(each), len(each.encode())) for each in texts)
    return Corpus("python-docs", *splits, tokenizer=tokenizer, test_text=texts.test)


def data_set_folder(name: str) -> Path:
    """Where `equilibria data get` puts a data set."""
    return cache_folder() / "data" / name


def find_files(data_set: DataSet, data_dir: str | Path | None = None) -> list[Path]:
    """The files of a data set, train first, under their own names or the original's. Raises UserError if one is missing."""
    names = [file.name for file in data_set.files]
    if data_dir is not None:
        places = [Path(data_dir), Path(data_dir) / data_set.name]
        for place in places:
            renamed = [place / name for name in TEXT_FILES]
            own = any((place / name).is_file() for name in names)
            if len(names) == len(renamed) and not own and all(path.is_file() for path in renamed):
                return renamed
        source = f"they are in {data_set.url}, which equilibria data get {data_set.name} fetches"
        return _find(places, names, source)
    folder = data_set_folder(data_set.name)
    if not folder.is_dir():
        raise UserError(
            f"{data_set.name} is not in {folder}; fetch it with: equilibria data get {data_set.name}, "
            f"or name with --data-dir a folder that holds {', '.join(names)}"
        )
    return _find([folder], names, f"fetch them with: equilibria data get {data_set.name}")


def _byte_corpus(name: str, path: Path, original: bool) -> Corpus:
    size = path.stat().st_size
    if size != HUNDRED_MILLION:
        raise UserError(f"{path} has {size:,} bytes, but {name} has {HUNDRED_MILLION:,}; fetch it again")
    values = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # memory-mapped
    parts = list(values.split([size - size // 10, size // 20, size // 20]))
    test_text = parts[2].numpy().tobytes().decode(errors="replace")
    if not original:
        tokenizer = Bytes(ALL if name == "enwik8" else TEXT8_ALPHABET)
        splits = (Split(tokenizer.encode_bytes(part), len(part)) for part in parts)
        return Corpus(name, *splits, tokenizer=tokenizer, test_text=test_text)
    if name == "enwik8":
        names = {value: str(value) for value in range(256) if value != ord("\n")}
    else:
        names = {value: chr(value).replace(" ", "_") for value in TEXT8_ALPHABET}
        parts = [_stripped(part) for part in parts]
    tokens, vocabulary = count_bytes(parts, names)
    splits = (Split(ids, len(ids)) for ids in tokens)
    return Corpus(name, *splits, tokenizer=vocabulary, test_text=test_text)


def _stripped(part: torch.Tensor) -> torch.Tensor:
    """The letters between the spaces that a text begins and ends with."""
    start, end = 0, len(part)
    while start < end and part[start] == ord(" "):
        start += 1
    while start < end and part[end - 1] == ord(" "):
        end -= 1
    return part[start:end]


def _find(places: list[Path], names: list[str], source: str) -> list[Path]:
    """Paths of the files `names` in the first of `places` that has one. Raises UserError if one is missing."""
    folder = places[0]
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; name a folder that holds {', '.join(names)}: {source}")
    place = next((place for place in places if any((place / name).is_file() for name in names)), None)
    looked_in = " or ".join(map(str, places if place is None else [place]))
    missing = [name for name in names if place is None or not (place / name).is_file()]
    if place is None or missing:
        raise UserError(f"there is no {', '.join(missing)} in {looked_in}; name a folder that has all files: {source}")
    return [place / name for name in names]
