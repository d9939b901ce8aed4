"""Recipes: functions that return the whole configuration of a run.

>>> RECIPES["quickstart"]().data.corpus
'python-docs'
"""

from collections.abc import Callable

from equilibria.recipes.laptop import (
    penn_treebank_char,
    penn_treebank_transformer,
    penn_treebank_trellisnet_small,
    quickstart,
    text,
    wikitext_2_transformer,
    wikitext_2_trellisnet,
)
from equilibria.recipes.scale import scaled
from equilibria.recipes.synthetic import copy_memory
from equilibria.recipes.trellisnet import penn_treebank_trellisnet
from equilibria.recipes.wikitext_103 import (
    wikitext_103_2021,
    wikitext_103_jacobian,
    wikitext_103_jacobian_pre_norm,
    wikitext_103_transformer,
    wikitext_103_transformer_medium,
    wikitext_103_transformer_small,
    wikitext_103_trellisnet,
)
from equilibria.train.config import RunConfig

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (
        quickstart,
        text,
        copy_memory,
        penn_treebank_transformer,
        penn_treebank_trellisnet,
        penn_treebank_trellisnet_small,
        penn_treebank_char,
        wikitext_2_transformer,
        wikitext_2_trellisnet,
        wikitext_103_transformer,
        wikitext_103_transformer_medium,
        wikitext_103_transformer_small,
        wikitext_103_trellisnet,
        wikitext_103_2021,
        wikitext_103_jacobian,
        wikitext_103_jacobian_pre_norm,
    )
}
"""Name on the command line -> recipe. The first line of a recipe's docstring is its description there."""

__all__ = [
    "RECIPES",
    "copy_memory",
    "penn_treebank_char",
    "penn_treebank_transformer",
    "penn_treebank_trellisnet",
    "penn_treebank_trellisnet_small",
    "quickstart",
    "scaled",
    "text",
    "wikitext_2_transformer",
    "wikitext_2_trellisnet",
    "wikitext_103_2021",
    "wikitext_103_jacobian",
    "wikitext_103_jacobian_pre_norm",
    "wikitext_103_transformer",
    "wikitext_103_transformer_medium",
    "wikitext_103_transformer_small",
    "wikitext_103_trellisnet",
]
