"""Level 9: the command line: thin verbs over the library, one file for each small group."""

from phikit.cli.app import main

__all__ = ["main"]
