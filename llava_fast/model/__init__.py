"""The network as nn.Modules: LLaVA, its vision tower and projector, its language model, and their caches."""
