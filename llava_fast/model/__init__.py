"""The model, its processor and its checkpoints."""
