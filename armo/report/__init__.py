"""A scoring model becomes an evaluation: metrics, rivals, style, pages."""
