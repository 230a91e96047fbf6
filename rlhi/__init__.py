"""RL from user conversations: a reproducible companion to arXiv 2509.25137, and a library made from it."""

__version__ = "0.1.0"
