"""`python -m mmrecoder_jax.watch --workdir=runs/tiny`

Serves the report of a work directory on this machine while a run goes: curves move, the newest
trajectories appear, alarms are red. Open the address that it prints in a browser; Ctrl-C ends it.
It reads the run's files alone, writes nothing, and starts no device. A run in a bucket
(`gs://BUCKET/PATH`) is looked at every 15 seconds while a page is open.

    --port=8088      0 takes a free one

From another machine, take a tunnel: `ssh -L 8088:127.0.0.1:8088 HOST`, with the same port here and
there.
"""

import contextlib
from pathlib import Path

from mmrecoder_jax import places
from mmrecoder_jax.command import Parser, ending_in_one_line
from mmrecoder_jax.config import ConfigError, check_place, check_port
from mmrecoder_jax.reporting.server import Live, Server

PORT = 8088


def main() -> None:
    """Serves until it is interrupted."""
    parser = Parser(prog="python -m mmrecoder_jax.watch", description=__doc__.split("\n\n")[1])
    parser.add_argument("--workdir", required=True, help="of a pipeline, or of a stage")
    parser.add_argument("--port", type=int, default=PORT, help=f"{PORT}; 0 takes a free one")
    given = parser.parse_args()
    with ending_in_one_line(given.traceback):
        check_place("--workdir", given.workdir)
        check_port(given.port)
        workdir = Path(places.view(given.workdir, "watch"))
        if not workdir.is_dir():
            raise ConfigError(
                f"--workdir={given.workdir!r}: no such directory; give that of a run, finished or "
                "not (runs/tiny, say)"
            )
        with Server(Live(workdir), given.port) as server:
            print(f"watching {given.workdir} at {server.url} (Ctrl-C ends it)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()


if __name__ == "__main__":
    main()
