"""The built-in demo: a small picture world, a tiny LLaVA trained on it, and a report."""
