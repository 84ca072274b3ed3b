"""Embeddings become fitted parts: heads, reward transform, gate."""
