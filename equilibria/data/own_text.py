"""A text of one's own as a corpus: any folder of text files, any data set of Hugging Face."""

from __future__ import annotations

from pathlib import Path

from equilibria.data.corpus import Corpus, Split
from equilibria.data.documents import LONG
from equilibria.data.hub import DataSetText, find_data_set_text
from equilibria.data.numbered_text import LARGE, Note, NumberedText, numbered_text
from equilibria.data.options import TextOptions
from equilibria.data.text_files import TextFiles, find_text_files
from equilibria.data.tokenizer import read_tokenizer
from equilibria.solution import UserError

VOCAB_SIZE = 2048
"""Tokens of a byte-pair vocabulary unless told otherwise: about 3 bytes of English per token."""


def text_corpus(
    data_dir: str | Path | None = None,
    options: TextOptions | None = None,
    *,
    vocab_size: int | None = None,
    note: Note = lambda line: None,
    large: int = LARGE,
) -> Corpus:
    """A text of one's own: the .txt, .jsonl and .parquet files in `data_dir`, or the data set `options.dataset`.

    - Documents: a .txt file is one, and so is each line of a .jsonl and each row of a .parquet, in `options.text_field`.
      Between two of them stands the end-of-text token, which no text can spell. Their order is kept; those that are
      empty are left out.
    - Splits: what the names of files, folders or splits say (`find_text_files`, `find_data_set_text`). What is missing of
      valid and test is taken out of train, always in the same way (`Carving`).
    - Tokens: byte pairs learnt from train, `vocab_size` of them (default 2048), or those of `options.tokenizer`. A text of
      8 MiB or more is cut into tokens once and kept in the cache (`numbered_text`).

    `note` is told what was found. Raises UserError that names the file and the line, or the field, if something cannot be
    used.

        text_corpus("my-text", TextOptions(text_field="content"), vocab_size=1024).test.bytes_per_token
    """
    options = options or TextOptions()
    if vocab_size is not None and options.tokenizer is not None:
        raise UserError(f"the tokenizer {options.tokenizer} has its vocabulary; leave --vocab-size out, or --tokenizer")
    if (data_dir is None) == (options.dataset is None):
        raise UserError("the corpus text is read from a folder or a data set; name the folder with --data-dir, or the "
                        "data set with --dataset, one of the two")  # fmt: skip
    if options.dataset is not None:
        source = find_data_set_text(
            options.dataset, options.dataset_config, field=options.text_field, streaming=options.streaming
        )
    else:
        assert data_dir is not None
        source = find_text_files(Path(data_dir), options.text_field)
    for line in source.notes:
        note(line)
    tokenizer = None if options.tokenizer is None else read_tokenizer(options.tokenizer)
    text = numbered_text(source, options, tokenizer, vocab_size or VOCAB_SIZE, note=note, large=large)
    _tell(source, options, text, note)
    splits = (
        Split(tokens, text_bytes, documents)
        for tokens, text_bytes, documents in zip(text.tokens, text.about.text_bytes, text.about.documents, strict=True)
    )
    return Corpus("text", *splits, tokenizer=text.tokenizer, test_text=text.test_text)


def _tell(source: TextFiles | DataSetText, options: TextOptions, text: NumberedText, note: Note) -> None:
    """How the splits and the tokens came about, if they were not given."""
    shares = ((1, "valid", options.valid_share), (2, "test", options.test_share))
    if taken := [f"{share:.3g} of it for {name}" for split, name, share in shares if not source.has(split)]:
        how = "documents by a hash of their text" if text.about.few is None else "the end of the text"
        note(f"out of train: {', '.join(taken)}; {how}, and the end of every document above {LONG >> 20} MiB")
    learnt = text.about.learnt_from
    if learnt is not None and learnt < 1:
        note(f"the tokens were learnt from {learnt:.1%} of train, spread over it")
    if text.folder is not None:
        note(f"its tokens are kept in {text.folder}")
