"""The version, where both setup and package read it."""

__version__ = "0.2.0"
