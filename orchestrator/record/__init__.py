"""What a run leaves beside the weights, in files and in MLflow."""
