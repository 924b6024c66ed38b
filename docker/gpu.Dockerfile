# The GPU profile: docker/README.md says how to build and run it. CUDA's libraries come with the pinned packages; the
# driver comes from the host.
FROM python:3.11-slim-bookworm

# Triton and DeepSpeed compile kernels while they run. Debian keeps one version of a package, so there is none to pin.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 coso

# The pinned packages first: this layer stays as it is while only the project's code changes.
WORKDIR /opt/coso-rl
ENV PIP_NO_CACHE_DIR=1
COPY pyproject.toml README.md LICENSE ./
COPY requirements/ requirements/
COPY tools/setup_machine.py tools/
RUN python tools/setup_machine.py --profile gpu --for-image

COPY envs/ envs/
COPY actors/ actors/
COPY scoring/ scoring/
COPY learner/ learner/
COPY cluster/ cluster/
RUN .venv/bin/pip install --no-deps --no-build-isolation --force-reinstall .

# What the NVIDIA container runtime lets into the container.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /home/coso
COPY --chown=1000:1000 configs/ configs/
USER 1000
ENTRYPOINT ["/opt/coso-rl/.venv/bin/coso"]
CMD ["--help"]
