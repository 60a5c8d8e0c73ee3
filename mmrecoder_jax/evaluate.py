"""`python -m mmrecoder_jax.evaluate --config=configs/evaluate.py:tiny
--config.init_from=runs/tiny/stage2 --workdir=runs/eval`
"""

from absl import app

from mmrecoder_jax import cli, train

if __name__ == "__main__":
    train.use_huge_pages()
    app.run(train.main, flags_parser=cli.parse_flags)
