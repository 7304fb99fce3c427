"""The name and the version of this package. Ray jobs carry the code without installing it, so both are in the code."""

# What pip installs. PyPI's `slimllm` is another project.
DISTRIBUTION = "slimllm-prune"
VERSION = "0.1.0"
