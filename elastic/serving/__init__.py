"""Sizes chosen where a model is loaded: `elastic.load`."""
