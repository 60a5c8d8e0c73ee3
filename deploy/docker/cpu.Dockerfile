# The package on a CPU: the tiny model, evaluations, scores, the page to draw on.
#
#   docker build -f deploy/docker/cpu.Dockerfile -t mmrecoder:cpu .
#   docker run --rm -v "$PWD/runs:/runs" mmrecoder:cpu mmrecoder_jax.train --config=pipeline:smoke --workdir=/runs/smoke
#
# Scripts of a policy are confined by Landlock and seccomp, which need neither root nor privileges of
# the container, but a kernel of 5.13 or newer and a runtime whose own seccomp profile lets both
# through (Docker's and containerd's defaults do). `mmrecoder_jax.env.sandbox --probe` says what there
# is. Never run with `--privileged` for it.
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir '/src[charts]' && rm -rf /src \
    && useradd --create-home --uid 1000 trainer && install -d -o trainer /runs
USER 1000
WORKDIR /home/trainer
VOLUME /runs
ENTRYPOINT ["python", "-m"]
CMD ["mmrecoder_jax.train", "--helpshort"]
