# The package on NVIDIA GPUs. CUDA itself comes with JAX's wheels; the host needs its driver and the
# NVIDIA container toolkit.
#
#   docker build -f deploy/docker/cuda.Dockerfile -t mmrecoder:cuda .
#   docker run --rm --gpus all --shm-size=8g -v "$PWD/runs:/runs" mmrecoder:cuda mmrecoder_jax.train --config=stage2 --workdir=/runs/stage2 --config.init_from=/runs/stage1 --config.data.dir=/runs/data
#
# The sandbox of scripts: see cpu.Dockerfile.
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir '/src[cuda,charts]' && rm -rf /src \
    && useradd --create-home --uid 1000 trainer && install -d -o trainer /runs
USER 1000
WORKDIR /home/trainer
VOLUME /runs
ENTRYPOINT ["python", "-m"]
CMD ["mmrecoder_jax.train", "--helpshort"]
