"""The scoring model in other people's programs."""
