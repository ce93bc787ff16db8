"""Reads and writes checkpoints in every LLaVA layout.

Weight files (`weights`) are opened with parameter names and config translated to ours (`layouts`, `reader`, `adapter`),
checked against the model (`strict`), and loaded (`load`). `save` writes a model; `assemble` makes one from a vision
tower and a language model.
"""
