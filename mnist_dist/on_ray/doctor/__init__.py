"""What is checked on every node before money is spent."""
