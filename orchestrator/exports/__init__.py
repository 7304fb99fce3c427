"""A pruned checkpoint in the forms that other programs load, one module for each."""
