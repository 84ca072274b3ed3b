"""Raw rows become conversations: objectives, row types, loading, guards, surface features."""
