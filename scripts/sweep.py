"""Trains every point of a grid, or of a random draw, of fields, and says which is best.

    python scripts/sweep.py --config=configs/stage2.py:tiny --workdir=runs/eta \\
        --config.init_from=runs/tiny/stage1 --config.data.dir=runs/tiny/data \\
        --sweep=config.reward.eta=0,0.1 --sweep=config.seed=0,1,2

    --dry_run                     print the commands
    --random=20                   draw settings; --sweep=config.optim.lr=log:1e-6:1e-4
    --shard=0/4 --workers=2       the part of one machine of four, two runs side by side
    --table --metric=turn1/reward the table of what is there
    --jobs=slurm                  the points as jobs of a cluster (slurm, kueue, xpk, skypilot)

Kill it at any point; the same command goes on. docs/sweeps.md has the rest.
"""

from mmrecoder_jax.sweeping.command import main

if __name__ == "__main__":
    main()
