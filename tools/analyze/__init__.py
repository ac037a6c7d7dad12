"""What a trained router does with text."""
