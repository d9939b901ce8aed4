"""The published data sets: where each comes from, and how to tell that what came is what was published.

Where a checksum comes from stands beside it. "Seen" means that independent public programs carry the same value;
none of the archives could be fetched while this was written, so that no value here is our own measurement but those
said to be.
"""

from __future__ import annotations

from dataclasses import dataclass

from equilibria.solution import UserError


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a data set as it stands in the cache."""

    name: str
    member: str
    """Its path in the archive."""
    size: int | None = None
    """Bytes."""
    checksum: str | None = None
    """'sha256:...', 'sha1:...' or 'md5:...'; None where none is known."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set that can be fetched."""

    name: str
    title: str
    url: str
    checksum: str
    """Of the archive: 'sha256:...' or 'md5:...'."""
    download: str
    """Size of the archive, for people."""
    files: tuple[File, ...]
    counts: tuple[int, int, int]
    """Tokens of train, valid and test."""
    vocabulary: int
    """Size of the vocabulary."""
    licence: str

    @property
    def archive(self) -> str:
        """File name of the archive."""
        return self.url.rsplit("/", 1)[1]


WIKITEXT = "CC BY-SA; Merity et al., ICLR 2017"
TREEBANK = "for research only, not to be redistributed; Marcus et al., 1993, prepared by Mikolov"
MAHONEY = "CC BY-SA and GFDL, text of Wikipedia; Mahoney, 2006"
SIMPLE_EXAMPLES = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
# MD5 of simple-examples.tgz: the data loaders of PaddlePaddle, seen in versions with this very address.
SIMPLE_EXAMPLES_CHECKSUM = "md5:30177ea32e27c525793142b6bf2c8e2d"

WIKITEXT_103 = DataSet(
    name="wikitext-103",
    title="WikiText-103, word level",
    url="https://wikitext.smerity.com/wikitext-103-v1.zip",
    # Seen in Julia's CorpusLoaders and in two Python programs, one of which fetched it from this address; it is the
    # archive of torchtext (MD5 9ddaacaf6af0710eda8c456decff7832), which had it from the authors' former address.
    checksum="sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    download="about 190 MB",
    files=(
        # SHA-1 of the files: GluonNLP's loader.
        File(
            name="wiki.train.tokens",
            member="wikitext-103/wiki.train.tokens",
            checksum="sha1:b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
        ),
        File(
            name="wiki.valid.tokens",
            member="wikitext-103/wiki.valid.tokens",
            checksum="sha1:c326ac59dc587676d58c422eb8a03e119582f92b",
        ),
        File(
            name="wiki.test.tokens",
            member="wikitext-103/wiki.test.tokens",
            checksum="sha1:8a5befc548865cec54ed4273cf87dbbad60d1e47",
        ),
    ),
    counts=(103_227_021, 217_646, 245_569),
    vocabulary=267_735,
    licence=WIKITEXT,
)

WIKITEXT_2 = DataSet(
    name="wikitext-2",
    title="WikiText-2, word level",
    url="https://wikitext.smerity.com/wikitext-2-v1.zip",
    # Seen in Julia's CorpusLoaders and two Python programs (the authors' former address; torchtext's MD5 of it is
    # 542ccefacc6c27f945fb54453812b3cd).
    checksum="sha256:92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
    download="about 4 MB",
    files=(
        # Measured on a copy of the files whose SHA-1 of train, 863f29c4..., is GluonNLP's.
        File(
            name="wiki.train.tokens",
            member="wikitext-2/wiki.train.tokens",
            size=10_797_148,
            checksum="sha256:9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
        ),
        File(
            name="wiki.valid.tokens",
            member="wikitext-2/wiki.valid.tokens",
            size=1_121_681,
            checksum="sha256:f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        ),
        File(
            name="wiki.test.tokens",
            member="wikitext-2/wiki.test.tokens",
            size=1_256_449,
            checksum="sha256:d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        ),
    ),
    counts=(2_088_628, 217_646, 245_569),
    vocabulary=33_278,
    licence=WIKITEXT,
)

PENN_TREEBANK = DataSet(
    name="penn-treebank",
    title="Penn Treebank, word level",
    url=SIMPLE_EXAMPLES,
    checksum=SIMPLE_EXAMPLES_CHECKSUM,
    download="about 35 MB",
    files=(
        # Measured on a copy of the files whose MD5s are torchtext's (f26c4b92..., aa0affc0..., 8b80168b...).
        File(
            name="ptb.train.txt",
            member="simple-examples/data/ptb.train.txt",
            size=5_101_618,
            checksum="sha256:fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        ),
        File(
            name="ptb.valid.txt",
            member="simple-examples/data/ptb.valid.txt",
            size=399_782,
            checksum="sha256:c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        ),
        File(
            name="ptb.test.txt",
            member="simple-examples/data/ptb.test.txt",
            size=449_945,
            checksum="sha256:dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        ),
    ),
    counts=(929_589, 73_760, 82_430),
    vocabulary=10_000,
    licence=TREEBANK,
)

PENN_TREEBANK_CHAR = DataSet(
    name="penn-treebank-char",
    title="Penn Treebank, character level",
    url=SIMPLE_EXAMPLES,
    checksum=SIMPLE_EXAMPLES_CHECKSUM,
    download="about 35 MB",
    # No checksum of these files is known. The counts are measured on the files of the word level, of which these are
    # the characters, with '_' for a space.
    files=tuple(
        File(name=f"ptb.char.{split}.txt", member=f"simple-examples/data/ptb.char.{split}.txt")
        for split in ("train", "valid", "test")
    ),
    counts=(5_017_482, 393_042, 442_423),
    vocabulary=50,
    licence=TREEBANK,
)

ENWIK8 = DataSet(
    name="enwik8",
    title="enwik8, bytes",
    url="http://mattmahoney.net/dc/enwik8.zip",
    # Of archive and file: seen in several programs; they name the file's MD5, a1fa5ffd..., which Mahoney published.
    checksum="sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    download="36 MB",
    files=(
        File(
            name="enwik8",
            member="enwik8",
            size=100_000_000,
            checksum="sha256:2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        ),
    ),
    counts=(90_000_000, 5_000_000, 5_000_000),
    vocabulary=256,
    licence=MAHONEY,
)

TEXT8 = DataSet(
    name="text8",
    title="text8, the letters a to z and the space",
    url="http://mattmahoney.net/dc/text8.zip",
    # Seen in several programs, as is the MD5 of the file.
    checksum="sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    download="31 MB",
    files=(File(name="text8", member="text8", size=100_000_000, checksum="md5:3bea1919949baf155f99411df5fada7e"),),
    counts=(90_000_000, 5_000_000, 5_000_000),
    vocabulary=27,
    licence=MAHONEY,
)

DATA_SETS = {
    data_set.name: data_set for data_set in (WIKITEXT_103, WIKITEXT_2, PENN_TREEBANK, PENN_TREEBANK_CHAR, ENWIK8, TEXT8)
}


def find_data_set(name: str) -> DataSet:
    """The data set of that name. Raises UserError if there is none.

    >>> find_data_set("enwik8").archive
    'enwik8.zip'
    """
    try:
        return DATA_SETS[name]
    except KeyError:
        raise UserError(f"there is no data set {name!r}; choose {', '.join(DATA_SETS)}") from None
