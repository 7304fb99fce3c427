"""Model families as a table, the classes of pruned models, and checks of a stranger's config."""
