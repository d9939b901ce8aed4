"""What every tokenizer can do, and reading back one that was saved."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from equilibria.data.byte_ids import Bytes
from equilibria.data.byte_pair import BytePair, declared_end
from equilibria.data.hub import fetch_tokenizer
from equilibria.data.vocabulary import Vocabulary
from equilibria.solution import UserError


class Tokenizer(Protocol):
    """Maps text to ids in 0 .. size - 1 and back."""

    kind: str
    """'words', 'bytes' or 'byte-pair'."""

    @property
    def size(self) -> int:
        """Number of tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of the tokens of `text`."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`."""
        ...

    def save(self, folder: Path) -> None:
        """Writes `folder`/tokenizer.json."""
        ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer whose `save(folder)` was called. Raises UserError if the folder holds none.

    load_tokenizer(Path("runs/first/tokenizer")).encode("some text")
    """
    path = folder / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); name a folder that a tokenizer was saved in") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save the tokenizer again") from None
    try:
        document = json.loads(text)
        if isinstance(document, dict) and document.get("kind") == Vocabulary.kind:
            return Vocabulary.from_document(document)
        if isinstance(document, dict) and document.get("kind") == Bytes.kind:
            return Bytes.from_document(document)
        return BytePair.from_json(text, declared_end(folder / "tokenizer_config.json"))
    except ValueError as error:
        raise UserError(f"{path} is not a saved tokenizer ({error}); save the tokenizer again") from None


def read_tokenizer(name: str) -> BytePair:
    """A tokenizer made elsewhere: a file tokenizer.json, a folder that has one, or a name on the Hugging Face Hub.

    What ends a text is what its tokenizer_config.json calls eos_token, or else a special token that is known for it; one
    that has neither is given `<|endoftext|>`. Raises UserError if it cannot be had or read.

        read_tokenizer("gpt2").encode("some text")
    """
    place = Path(name).expanduser()
    path, config = (place / "tokenizer.json", place / "tokenizer_config.json") if place.is_dir() else (place, None)
    if not place.exists():
        if place.is_absolute() or name.startswith((".", "~")) or place.suffix == ".json":
            raise UserError(
                f"there is no tokenizer {name}; name a tokenizer.json, a folder with one, or a model of the Hub"
            )
        path, config = fetch_tokenizer(name)
    elif place.is_file():
        config = place.with_name("tokenizer_config.json")
    if not path.is_file():
        raise UserError(f"{name} has no tokenizer.json; name a folder that a fast tokenizer was saved in, or its file")
    try:
        return BytePair.from_json(path.read_text(encoding="utf-8")).ending(declared_end(config))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no tokenizer that can be read ({error}); name another, or save it again") from None
