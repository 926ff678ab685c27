"""The version, where both setup and package read it."""

__version__ = "0.1.0"
