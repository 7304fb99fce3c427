"""Records a run next to the weights, in files and in MLflow."""
