"""The version of this package, in the code: where the code travels with a Ray job, nothing is installed to ask."""

VERSION = "0.1.0"
