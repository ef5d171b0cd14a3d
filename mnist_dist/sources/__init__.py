"""Where images come from: listing them, their labels, and reading their encoded bytes."""
