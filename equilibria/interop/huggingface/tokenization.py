"""Our tokenizers in the form of Hugging Face: the same ids for the same text, and the same text for the same ids."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders as backends
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from equilibria.data import Tokenizer
from equilibria.data.byte_ids import Bytes
from equilibria.data.vocabulary import EOS, UNK, Vocabulary
from equilibria.solution import UserError

NO_WORD_BEGINS_SO = "\ue000"
"""What the decoder of word pieces takes for the mark of a word that goes on: of a private plane of Unicode."""
NO_TEXT_HAS = "\u00ff"
"""The byte 0xFF, which no UTF-8 text holds, as byte-level tokenizers spell it: it can end a text or pad it."""


def huggingface_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as `AutoTokenizer` would load it; `save_pretrained` writes it.

    - Words: `<eos>`, the end of a line, is also the end of a text and the padding; `<unk>` is the unknown word. A decoder
      that skips special tokens skips line ends: pass skip_special_tokens=False.
    - Byte pairs and bytes: the token between documents, where there is one, ends and pads a text; else the byte 0xFF,
      which stands in no text, so that the model has never seen it. An alphabet without that byte leaves both unset.

    Special tokens that are spelled out in a text are read as the text they are, as by our own tokenizers.
    """
    special: dict[str, Any] = {}
    if isinstance(tokenizer, Vocabulary):
        backend = _words(tokenizer)
        special = {name: word for name, word in (("eos_token", EOS), ("unk_token", UNK)) if word in tokenizer.words}
    else:
        backend = _bytes(tokenizer) if isinstance(tokenizer, Bytes) else _saved(tokenizer)
        end = getattr(tokenizer, "end_of_text", None) or NO_TEXT_HAS
        if backend.token_to_id(end) is not None:
            special = {"eos_token": end}
    if "eos_token" in special:
        special["pad_token"] = special["eos_token"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **special,
    )
    size = max(fast.get_vocab().values()) + 1
    if size != tokenizer.size:
        raise UserError(f"the tokenizer has {tokenizer.size:,} tokens, but {size:,} in the form of Hugging Face")
    return fast


def _words(vocabulary: Vocabulary) -> Backend:
    """Words that white space separates, and `<eos>` for each newline."""
    unknown = UNK if UNK in vocabulary.words else f"no {UNK}"  # without one, an unknown word is refused
    ids = {word: i for i, word in enumerate(vocabulary.words)}
    backend: Any = Backend(WordLevel(ids, unk_token=unknown))
    steps: list[Any] = [normalizers.Replace(Regex("[\x1c-\x1f]"), " ")]  # white space in Python, but not in Rust
    if vocabulary.lower_case:
        steps.append(normalizers.Lowercase())
    if vocabulary.end_of_line:
        steps.append(normalizers.Replace("\n", f" {EOS} "))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    joined: list[Any] = [backends.WordPiece(prefix=NO_WORD_BEGINS_SO, cleanup=False), backends.Fuse()]
    if vocabulary.end_of_line:  # "a <eos> b" -> "a\nb"
        joined += [backends.Replace(Regex(rf"(?<!\S){EOS}(?!\S)"), "\n"), backends.Replace(Regex(" ?\n ?"), "\n")]
    backend.decoder = backends.Sequence(joined)
    return backend


def _bytes(tokenizer: Bytes) -> Backend:
    """One token for each byte; one outside the alphabet is refused."""
    spelled = _spelling()
    ids = {spelled[byte]: i for i, byte in enumerate(tokenizer.alphabet)}
    backend: Any = Backend(WordLevel(ids, unk_token="a byte outside the alphabet"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    backend.decoder = backends.ByteLevel()
    return backend


def _spelling() -> list[str]:
    """The character that stands for each of the 256 bytes in byte-level tokenizers: itself where it can be seen."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


def _saved(tokenizer: Tokenizer) -> Backend:
    """Of a tokenizer that saves itself in the form of the `tokenizers` library."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        path = Path(folder) / "tokenizer.json"
        kind = json.loads(path.read_text(encoding="utf-8")).get("kind")
        if kind is not None:
            raise UserError(f"a tokenizer of the kind {kind!r} has no form of Hugging Face; give words, bytes or byte-pair")
        backend: Any = Backend.from_file(str(path))
    backend.post_processor = None  # what it would add to a text, we do not add
    return backend
