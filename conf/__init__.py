"""Configuration of the `armo` commands, importable as `armo.conf`."""
