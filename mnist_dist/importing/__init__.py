"""Foreign models become bundles: what they say about themselves, the ONNX graph, the comparison."""
