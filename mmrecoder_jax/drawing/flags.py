"""The flags that name an author, the same for every command that asks one."""

import argparse

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.drawing.authors import check_samples
from mmrecoder_jax.drawing.open import Who
from mmrecoder_jax.drawing.server import KEY_VARIABLE
from mmrecoder_jax.env.sandbox.confinement import SandboxMode


def add_author(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint, --server, --model, --key-variable, --max-tokens and --sandbox."""
    group = parser.add_argument_group("who writes the code, by default the policy in the box")
    add = group.add_argument
    what = "a work directory of a stage, or a Hugging Face directory"
    add("--checkpoint", default="", metavar="DIR", help=what)
    what = "a model behind an OpenAI-compatible server, such as http://localhost:8000/v1"
    add("--server", default="", metavar="URL", help=what)
    add("--model", default="", metavar="NAME", help="the name that the server knows it by")
    what = f"environment variable with the server's key ({KEY_VARIABLE})"
    add("--key-variable", default=KEY_VARIABLE, metavar="NAME", help=what)
    what = "longest answer of a server (4096)"
    add("--max-tokens", type=int, default=4096, metavar="N", help=what)
    what = "auto: contain scripts or refuse; unsafe: run them with this user's rights"
    add("--sandbox", default=str(SandboxMode.AUTO), metavar="MODE", help=what)


def author_of(args: argparse.Namespace) -> Who:
    """Whom the flags of `add_author` name.

    Raises:
      ConfigError: a value that cannot be.
    """
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens={args.max_tokens}: use 1 or more")
    if args.sandbox not in tuple(SandboxMode):
        raise ConfigError(f"--sandbox={args.sandbox!r}: use one of {', '.join(SandboxMode)}")
    return Who(
        args.checkpoint, args.server, args.model, args.key_variable, max_tokens=args.max_tokens
    )


def temperature_of(samples: int, temperature: float | None) -> float:
    """The temperature to sample at; None: 0 for one sample, and 1 for several.

    Raises:
      ConfigError: one that cannot be, or at which all samples would be equal.
    """
    if temperature is None:
        return 1.0 if samples > 1 else 0.0
    if not 0 <= temperature <= 10:
        raise ConfigError(f"--temperature={temperature}: use 0 (greedy) to 10")
    check_samples(samples, temperature)
    return temperature
