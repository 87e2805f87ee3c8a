"""Adapters of models by other people, one small file for each family; loaded when a model needs them."""
