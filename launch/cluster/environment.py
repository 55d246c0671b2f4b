"""Which variables of the environment go with a command to other hosts: settings and paths, never secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mcl_dist.errors import ConfigError

PREFIXES = ("NCCL_", "GLOO_", "OMP_", "MKL_", "TORCH_", "UCX_", "DALI_", "DS_")
NAMES = (
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "AWS_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "FSSPEC_CONFIG_DIR",
)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|PRIVATE|API_?KEY", re.IGNORECASE)


def travelling(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """Variables of the allow-list, and those named in `more`.

    Raises:
        ConfigError: a named variable is not set, or by its name a secret: command lines are for all to read.
    """
    for name in more:
        if not NAME.fullmatch(name) or name not in environment:
            raise ConfigError(f"--export: {name!r} is not set here; name a variable of this environment")
        if SECRET.search(name) and not name.endswith(("_FILE", "_PATH", "_DIR")):
            raise ConfigError(
                f"--export: {name} looks like a secret, which all would read on the hosts' command lines; keep it in a "
                "file on the hosts and export its path, for example AWS_SHARED_CREDENTIALS_FILE"
            )
    return {
        name: value
        for name, value in environment.items()
        if NAME.fullmatch(name)
        and (name in more or name in NAMES or (name.startswith(PREFIXES) and not SECRET.search(name)))
    }
