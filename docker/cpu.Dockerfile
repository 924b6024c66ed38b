# The CPU profile: docker/README.md says how to build and run it.
FROM python:3.11-slim-bookworm

# vLLM's CPU build loads libnuma. Debian keeps one version of a package, so there is none to pin.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 coso

# The pinned packages first: this layer stays as it is while only the project's code changes.
WORKDIR /opt/coso-rl
ENV PIP_NO_CACHE_DIR=1
# Where PyTorch's CPU wheels are, if the package index has only CUDA builds.
ARG PIP_EXTRA_INDEX_URL
COPY pyproject.toml README.md LICENSE ./
COPY requirements/ requirements/
COPY tools/setup_machine.py tools/
RUN python tools/setup_machine.py --profile cpu --for-image

COPY envs/ envs/
COPY actors/ actors/
COPY scoring/ scoring/
COPY learner/ learner/
COPY cluster/ cluster/
RUN .venv/bin/pip install --no-deps --no-build-isolation --force-reinstall .

WORKDIR /home/coso
COPY --chown=1000:1000 configs/ configs/
USER 1000
ENTRYPOINT ["/opt/coso-rl/.venv/bin/coso"]
CMD ["--help"]
