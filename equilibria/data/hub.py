"""Data sets and tokenizers of the Hugging Face Hub, or made by its libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equilibria.data.documents import Advance, Document, checked, extra, missing_field
from equilibria.data.text_files import NAMED, SPLITS
from equilibria.solution import UserError

ROWS = 1000  # of a data set that are in memory at a time


@dataclass(frozen=True)
class DataSetText:
    """The splits of a Hugging Face data set. Made by `find_data_set_text`."""

    name: str
    field: str
    splits: tuple[Any, Any, Any]
    """`Dataset` or `IterableDataset` of train, valid and test; None where there is none."""
    fingerprint: object
    notes: tuple[str, ...] = ()

    def has(self, split: int) -> bool:
        """Whether there is a split train (0), valid (1) or test (2)."""
        return self.splits[split] is not None

    def documents(self, split: int, advance: Advance = lambda size: None) -> Iterator[Document]:
        """The texts of a split, in its order."""
        if self.splits[split] is None:
            return
        number = 0
        with _explained(self.name):
            for rows in self.splits[split].select_columns([self.field]).iter(batch_size=ROWS):
                for value in rows[self.field]:
                    number += 1
                    text = checked(value, self.field, f"row {number} of {self.name}")
                    advance(len(text))
                    yield text

    def size(self) -> int | None:
        """Bytes of the whole data set in memory; None for one that is read as it arrives."""
        tables = [getattr(split, "data", None) for split in self.splits if split is not None]
        sizes = [table.nbytes for table in tables if table is not None]
        return sum(sizes) if len(sizes) == len(tables) else None

    def key(self) -> object:
        """What decides the documents."""
        return [self.field, self.fingerprint]

    def where(self, split: int) -> str:
        """Words for a split."""
        return f"the {SPLITS[split]} split of {self.name}" if self.splits[1:] != (None, None) else self.name


def find_data_set_text(
    name: str, config: str | None = None, *, field: str = "text", streaming: bool = False
) -> DataSetText:
    """A data set by its name on the Hub, or in a folder: one that `save_to_disk` wrote, or of files that `datasets` reads.

    Its splits train, validation (valid, val, dev) and test are used. A data set of one split is train, whatever its name.
    Raises UserError that says what to do if it cannot be had, or has no such split or field.
    """
    datasets = extra("datasets")
    with _explained(name):
        place = Path(name).expanduser()
        version = None
        if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
            found = datasets.load_from_disk(str(place))
        else:
            where = str(place) if place.exists() else name
            found = datasets.load_dataset(where, config, streaming=streaming)
            if streaming:  # the splits do not say which files they read; the builder knows their versions
                builder = datasets.load_dataset_builder(where, config)
                version = [name, builder.config.name, builder.hash]
    found = dict(found) if isinstance(found, dict) else {"train": found}
    splits, unused = _three(name, found)
    for split in splits:
        if split is not None:
            _check_field(name, split, field)
    fingerprint = version or [None if split is None else split._fingerprint for split in splits]
    notes = (f"its splits {', '.join(unused)} are not used",) if unused else ()
    return DataSetText(name, field, splits, fingerprint, notes)


def fetch_tokenizer(name: str) -> tuple[Path, Path | None]:
    """tokenizer.json of a model on the Hub, and its tokenizer_config.json if it has one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
    except GatedRepoError:
        raise UserError(
            f"the tokenizer {name} is open only to those who accepted its terms; do so on its page, and log in with: "
            "hf auth login"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"there is no tokenizer {name}, neither as a file or folder here nor on the Hugging Face Hub; check the name, "
            "or log in with: hf auth login, if it is private"
        ) from None
    except LocalEntryNotFoundError:  # not kept from earlier, and no network
        raise _not_reached("tokenizer", name) from None
    except EntryNotFoundError:
        raise UserError(
            f"{name} has no tokenizer.json on the Hugging Face Hub; name a model with a fast tokenizer"
        ) from None
    except OSError:
        raise _not_reached("tokenizer", name) from None
    try:
        return path, Path(hf_hub_download(name, "tokenizer_config.json"))
    except (EntryNotFoundError, OSError):
        return path, None


def _three(name: str, found: dict[str, Any]) -> tuple[tuple[Any, Any, Any], list[str]]:
    splits: list[Any] = [None, None, None]
    unused = []
    for key, split in found.items():
        match = NAMED.fullmatch(str(key))
        index = (match.lastindex or 1) - 1 if match else 0 if len(found) == 1 else None
        if index is None or splits[index] is not None:
            unused.append(str(key))
        else:
            splits[index] = split
    if len(found) == 1:
        splits = [next(iter(found.values())), None, None]
    if splits[0] is None:
        raise UserError(f"{name} has the splits {', '.join(map(str, found))}, but none called train; save one of that name")
    return (splits[0], splits[1], splits[2]), unused


def _check_field(name: str, split: Any, field: str) -> None:
    features = split.features
    if features is None:  # a stream that has not said
        return
    if field not in features:
        raise missing_field(field, name, features)
    kind = getattr(features[field], "dtype", None)
    if kind not in ("string", "large_string", "null"):
        texts = [other for other, value in features.items() if getattr(value, "dtype", None) in ("string", "large_string")]
        instead = f"name one that does with --text-field: {', '.join(texts)}" if texts else "give another data set"
        raise UserError(f"the field {field!r} of {name} holds {kind or features[field]}, not text; {instead}")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what the library raises into one sentence."""
    datasets = extra("datasets")
    try:
        yield
    except UserError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error).lower():
            remedy = "accept its terms on its page, and log in with: hf auth login"
        else:
            remedy = "check the name, or log in with: hf auth login, if it is private"
        raise UserError(f"there is no data set {name} that can be read ({_first_line(error)}); {remedy}") from None
    except (ConnectionError, TimeoutError):
        raise _not_reached("data set", name) from None
    except (ValueError, RuntimeError, OSError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the data set {name} cannot be read ({_first_line(error)}); check its name, --dataset-config and --text-field"
        ) from None


def _not_reached(what: str, name: str) -> UserError:
    return UserError(
        f"the {what} {name} is neither here nor kept from earlier, and the Hugging Face Hub cannot be reached; fetch it on "
        "a machine with a network and name its folder here, or set HF_HOME to a cache that has it"
    )


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
