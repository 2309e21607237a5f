"""The version, read by the build and by `trimtab.__version__`."""

__version__ = "0.1.0"
