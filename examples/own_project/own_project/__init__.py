"""A router and a metric of its own for dcdit, which are entered in its tables when this package is imported."""

from own_project import metric, router

__all__ = ["metric", "router"]
