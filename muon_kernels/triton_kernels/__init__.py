"""The verbs as Triton kernels, a file a family: kernels and their launchers."""
