"""Recipes: functions that return the whole configuration of a run.

>>> RECIPES["quickstart"]().data.corpus
'python-docs'
"""

from equilibria.recipes.language_models import penn_treebank, quickstart, text, wikitext_2

RECIPES = {"quickstart": quickstart, "text": text, "penn-treebank": penn_treebank, "wikitext-2": wikitext_2}
"""Name on the command line -> recipe. The first line of a recipe's docstring is its description there."""

__all__ = ["RECIPES", "penn_treebank", "quickstart", "text", "wikitext_2"]
