"""Model ladders and task scaling laws (arXiv 2412.04403)."""
