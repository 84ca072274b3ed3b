"""Fitted parts become a scoring model: the model folder and what one asks of it."""
