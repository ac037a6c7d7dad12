"""Models after training: convert, export, generate, evaluate, analyze; read both checkpoint formats."""
