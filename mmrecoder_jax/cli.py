"""Reading the flags of the commands, whose `--config` is a configuration file with overridable
fields.
"""

import runpy
import sys

from absl import flags

from mmrecoder_jax.config import suggest


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser; a field that does not exist is answered with the nearest names there are."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        config = flags.FLAGS.config if flags.FLAGS.is_parsed() else _config_of(argv)
        for argument in argv[1:]:
            name = argument.lstrip("-").split("=", 1)[0]
            if (
                config is not None
                and name.startswith("config.")
                and not _has(config, name.removeprefix("config."))
            ):
                sys.exit("error: " + suggest(name.removeprefix("config."), config))
        sys.exit(f"error: {error}")


def _config_of(argv: list[str]):
    """The configuration that `--config=` names, without overrides; None where there is none."""
    for argument in argv[1:]:
        if argument.lstrip("-").startswith("config="):
            path, _, size = argument.split("=", 1)[1].partition(":")
            return runpy.run_path(path)["get_config"](size or None)
    return None


def _has(config, field: str) -> bool:
    for name in field.split("."):
        if not hasattr(config, "keys") or name not in config:
            return False
        config = config[name]
    return True
