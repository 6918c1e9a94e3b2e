"""FID and its like: features, statistics of references, measurements at several budgets, and the report."""
