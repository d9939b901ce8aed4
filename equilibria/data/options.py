"""How a text of one's own is found, read, divided and cut into tokens: plain values."""

from __future__ import annotations

from dataclasses import dataclass

from equilibria.solution import UserError


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """A text of your own (corpus text): what is read, where valid and test come from, which tokenizer."""

    dataset: str | None = None
    """Hugging Face data set in place of --data-dir: its name on the Hub, or a folder."""
    dataset_config: str | None = None
    """Configuration of the data set, where it has several."""
    streaming: bool = False
    """Read a data set of the Hub as it arrives, without a copy of it on the disk; its tokens are kept all the same."""
    text_field: str = "text"
    """Field of a .jsonl or .parquet file, or of a data set, that holds the text."""
    max_documents: int | None = None
    """Read the first so many documents of each split; None: all."""
    tokenizer: str | None = None
    """File tokenizer.json, folder that has one, or name on the Hub; None: learn byte pairs from the train split."""
    valid_share: float = 0.05
    """Share of the text to validate on, where no files and no split of the data set are for that."""
    test_share: float = 0.05
    """Share of the text to test on, likewise."""

    def __post_init__(self) -> None:
        for name in ("valid_share", "test_share"):
            if not 0 < getattr(self, name) <= 0.5:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give a share above 0, at most 0.5")
        if self.valid_share + self.test_share >= 1:
            raise UserError("--valid-share and --test-share leave nothing to train on; give less than 1 together")
        if self.max_documents is not None and self.max_documents < 1:
            raise UserError(f"--max-documents is {self.max_documents}; give at least 1")
        if self.dataset is None and (self.dataset_config is not None or self.streaming):
            what = "--streaming" if self.streaming else "--dataset-config"
            raise UserError(f"{what} is for a data set; name one with --dataset, or leave it out")
