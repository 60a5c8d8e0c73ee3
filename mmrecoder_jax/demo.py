"""A page on which charts are redrawn, turn by turn; needs the extra `ui` (gradio).

    pip install 'mmrecoder_jax[ui]'
    python -m mmrecoder_jax.demo
    python -m mmrecoder_jax.demo --checkpoint=runs/tiny/stage2 --port=7861
    python -m mmrecoder_jax.demo --server=http://localhost:8000/v1 --model=NAME

It is served on the loopback interface, unless `--host` says otherwise. Visitors drop or paste a
chart, see each turn's code, render and difference, may edit the code and run it in the sandbox, and
ask for another turn.
"""
