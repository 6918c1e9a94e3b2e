"""The page of ``dcdit.explore``: what may be chosen, what samples it, and what is shown of it."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
