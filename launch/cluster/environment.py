"""Environment variables that are forwarded to other hosts: settings and paths, never secrets."""

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


def forwarded_environment(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """Variables of the allow-list, and those named in `more`.

    Raises:
        ConfigError: a variable in `more` is not set, or its name looks like a secret: command lines are public.
    """
    for name in more:
        if not NAME.fullmatch(name) or name not in environment:
            raise ConfigError(f"--export: {name!r} is not set here; name a variable of this environment")
        if SECRET.search(name) and not name.endswith(("_FILE", "_PATH", "_DIR")):
            raise ConfigError(
                f"--export: {name} looks like a secret, and all users of the hosts can read command lines; put it in a "
                "file on the hosts and export the file's path, for example AWS_SHARED_CREDENTIALS_FILE"
            )
    return {
        name: value
        for name, value in environment.items()
        if NAME.fullmatch(name)
        and (name in more or name in NAMES or (name.startswith(PREFIXES) and not SECRET.search(name)))
    }
