"""The launcher behind ``cluster=slurm``. Every program that uses Hydra loads this at its start: nothing heavy here."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as SubmititLauncher
except ImportError:

    class SlurmLauncher(Launcher):
        """The launcher if the extra ``slurm`` is not installed: it only says so."""

        def setup(self, **ignored: object) -> None:
            """Raise UserError, before anything is written."""
            from dcdit.errors import UserError
            from dcdit.runtime.imports import remedy_for

            remedy = remedy_for("hydra_plugins.hydra_submitit_launcher")
            raise UserError(f"cluster=slurm needs {remedy}, or take cluster=local")

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Never reached: :meth:`setup` comes first."""
            raise NotImplementedError
else:

    class SlurmLauncher(SubmititLauncher):  # type: ignore[misc, no-redef]  # its base has no annotations
        """Submits by submitit what :mod:`dcdit.cluster` makes of the configuration."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Submit one job for each element of ``job_overrides``, and wait for all."""
            from dcdit.runtime.imports import check_installed

            check_installed("submitit", "cluster=slurm", "take cluster=local")
            from dcdit.cluster.launch import launch

            assert self.config is not None
            assert self.hydra_context is not None
            load = self.hydra_context.config_loader.load_sweep_config
            configs = [load(self.config, list(overrides)) for overrides in job_overrides]
            return launch(self, configs, [list(overrides) for overrides in job_overrides], initial_job_idx)

        def __call__(self, *arguments: Any) -> JobReturn:
            """Run one process of a job."""
            from dcdit.cluster.job import enter_job

            enter_job()
            return super().__call__(*arguments)
