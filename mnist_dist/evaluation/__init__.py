"""What a model's predictions are worth: the truth, the numbers, two tables side by side, the report."""
