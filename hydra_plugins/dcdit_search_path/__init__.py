"""The configuration files of plug-ins. Every program that uses Hydra loads this at its start: nothing heavy here."""

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class PluginSearchPath(SearchPathPlugin):
    """Has Hydra look into the folders that the plug-ins of dcdit brought, after our own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folders; none in a program that does not use dcdit."""
        plugins = sys.modules.get("dcdit.settings.plugins")
        for folder in plugins.config_folders()[1:] if plugins else ():
            search_path.append("dcdit plug-in", f"file://{folder}")
