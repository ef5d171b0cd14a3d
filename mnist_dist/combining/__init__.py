"""Several bundles become one: soups (`soups`) average weights, ensembles (`ensembles`) average probabilities."""
