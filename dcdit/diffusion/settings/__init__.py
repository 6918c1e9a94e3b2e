"""The settings of diffusion processes, samplers, guidance and budgets, and the tables of processes and samplers.

An entry of a table is a class of settings that names its implementation, which is imported when it is built: torch
takes seconds to import, and a mistake is to be reported at once.
"""

from dcdit.diffusion.settings.guidance import (
    PATH_DROP,
    BudgetSettings,
    DropSchedule,
    GuidanceScale,
    GuidanceSettings,
    Timestep,
)
from dcdit.diffusion.settings.processes import (
    PROCESSES,
    PUBLISHED_PROCESS,
    TRAIN_STEPS,
    WEIGHTINGS,
    FlowMatching,
    NoiseDiffusion,
    ProcessSettings,
    TimeShift,
    Weighting,
)
from dcdit.diffusion.settings.samplers import (
    DDIM,
    DDPM,
    SAMPLERS,
    Auto,
    CacheThreshold,
    DPMSolver,
    Euler,
    EulerMaruyama,
    Heun,
    SamplerOptions,
    SamplerSettings,
    Steps,
    samplers_of,
)
