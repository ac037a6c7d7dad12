"""Continue a text with a trained model."""
