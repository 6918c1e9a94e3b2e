"""Check values against annotations: one mechanism for configurations, constructors and library calls.

Every failure is a :class:`dcdit.errors.UserError` that names the value and the remedy.
"""

from dcdit.checks.checking import (
    MISSING,
    annotations,
    call_checked,
    checked,
    config,
    conform,
    is_plain_whole,
    suggestion,
    to_plain,
)
from dcdit.checks.choices import Named, NamedSettings, WithOthers, build_named
from dcdit.checks.constraints import (
    FLOAT_NAMES,
    HUB_ID,
    Bounds,
    Capacity,
    Columns,
    Compression,
    Count,
    Depth,
    Digest,
    DropFraction,
    Grid,
    Images,
    LabelDropout,
    Matches,
    Meant,
    MlpRatio,
    Name,
    Natural,
    NonNegative,
    NotEmpty,
    Number,
    OneOf,
    Positive,
    Seed,
    Shown,
    Size,
    TailDrop,
    TimeFraction,
    Workers,
)
from dcdit.checks.messages import LONGEST_SHOWN, check_credentials, reason_of, shown, visible, without_credentials
from dcdit.checks.tables import Table, named_entries
