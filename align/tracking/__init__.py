"""A stage's metrics in, TensorBoard, Weights & Biases or MLflow out."""
