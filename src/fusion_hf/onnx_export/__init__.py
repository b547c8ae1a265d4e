"""FUSION outside PyTorch: export to ONNX, and answers of onnxruntime."""
