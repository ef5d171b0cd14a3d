"""A bundle's model as something that only predicts: converted, checked, exported."""
