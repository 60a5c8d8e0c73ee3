# The package on TPUs, for GKE (deploy/gke/jobset.yaml) and xpk.
#
#   docker build -f deploy/docker/tpu.Dockerfile -t REGISTRY/mmrecoder:tpu .
#   docker push REGISTRY/mmrecoder:tpu
#
# The sandbox of scripts: see cpu.Dockerfile.
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir '/src[tpu,charts]' && rm -rf /src \
    && useradd --create-home --uid 1000 trainer && install -d -o trainer /runs
USER 1000
WORKDIR /home/trainer
VOLUME /runs
ENTRYPOINT ["python", "-m"]
CMD ["mmrecoder_jax.train", "--helpshort"]
