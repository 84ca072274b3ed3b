"""The small corpus that ships with the package; see its README.md and `compose`."""
