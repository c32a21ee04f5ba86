"""Adapters for training frameworks: both passes of SAM in loops that call one step.

`lightning`, `transformers`, `accelerate` and `fastai` are imported only on demand; so is `cli`,
classes whose signatures name all options. docs/recipes.md has a recipe for each.
"""
