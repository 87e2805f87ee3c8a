"""A look inside a trained model."""
