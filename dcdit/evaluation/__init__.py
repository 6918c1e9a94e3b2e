"""FID and its like: features, statistics of references, and measurements at several budgets."""
