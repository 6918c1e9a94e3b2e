"""The page of ``dcdit.explore``: what may be chosen, what samples it, and what is shown of it."""
