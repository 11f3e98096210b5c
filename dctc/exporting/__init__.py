"""A model for other people's programs: ONNX, torch.export, MLflow."""
