"""Conversations become embeddings: boundary, backbone, batching, the store, resumable passes."""
