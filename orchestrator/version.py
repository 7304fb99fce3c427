"""Holds the name and version of this package. They are in the code because Ray jobs use it without installing it."""

# The name for pip. PyPI's `slimllm` is another project.
DISTRIBUTION = "slimllm-prune"
VERSION = "0.1.0"
