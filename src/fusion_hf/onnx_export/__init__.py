"""FUSION without PyTorch: export to ONNX, and inference with onnxruntime."""
