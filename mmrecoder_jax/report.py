"""`python -m mmrecoder_jax.report --workdir=runs/tiny`

Makes the report of a work directory anew, of a pipeline or of one stage, finished or not:
`report.html` and its data in `report/`. Open the page in a browser; it needs no server and no
network. It reads the run's files alone and starts no device. Of a run in a bucket
(`gs://BUCKET/PATH`) the page is written beside it, in the bucket.

    --one_file=mail.html      one file of some megabytes instead, which can be mailed
    --trajectories=1000       how many trajectories at most, the newest
"""

from mmrecoder_jax import places
from mmrecoder_jax.command import Parser, ending_in_one_line
from mmrecoder_jax.config import ConfigError, check_output, check_place
from mmrecoder_jax.reporting.report import MOST, MOST_OF_ONE_FILE, write_one_file, write_report


def main() -> None:
    """Writes the page and prints its path."""
    parser = Parser(prog="python -m mmrecoder_jax.report", description=__doc__.split("\n\n")[1])
    parser.add_argument("--workdir", required=True, help="of a pipeline, or of a stage")
    parser.add_argument("--one_file", default="", help="write one file with everything in it here")
    parser.add_argument(
        "--trajectories",
        type=int,
        default=None,
        help=f"at most, the newest ({MOST}; of one file {MOST_OF_ONE_FILE})",
    )
    given = parser.parse_args()
    with ending_in_one_line(given.traceback):
        check_place("--workdir", given.workdir)
        if given.trajectories is not None and given.trajectories < 0:
            raise ConfigError(f"--trajectories={given.trajectories}: use 0 or more")
        if given.one_file:
            check_output("--one_file", given.one_file)
        workdir = places.view(given.workdir, "report", alone=True)
        if given.one_file:
            most = MOST_OF_ONE_FILE if given.trajectories is None else given.trajectories
            print(f"report: {write_one_file(workdir, given.one_file, most)}")
        else:
            most = MOST if given.trajectories is None else given.trajectories
            print(f"report: {places.shown(write_report(workdir, most))}")


if __name__ == "__main__":
    main()
