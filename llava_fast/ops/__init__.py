"""One file per operation: the reference in plain PyTorch, kernels, registration, and the public function."""
