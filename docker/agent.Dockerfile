# The agent, and the gateway too: torch with its CUDA libraries comes from PyPI, the driver from the node.
#   docker build -f docker/agent.Dockerfile -t blockyard-agent:0.1.0 .
ARG PYTHON=3.12.12-slim-bookworm

FROM python:${PYTHON} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE __init__.py cli.py user_cache.py py.typed ./
COPY kernels kernels
COPY engine engine
COPY agent agent
COPY operator operator
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}
# g++: Triton compiles its launchers, and the CPU path its kernels, in the running container.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# [convert]: the first agent that uses a model from a hub or a GGUF file converts it, once.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[convert]"
# Prepared models and compiled kernels are written here. Mount a volume to keep them; all else is only read.
ARG CACHE=/cache
ARG UID=1000
ENV HOME=${CACHE} BLOCKYARD_CACHE=${CACHE}
RUN install --directory --owner=${UID} --group=${UID} ${CACHE}
USER ${UID}:${UID}
WORKDIR ${CACHE}
EXPOSE 8000 8080
ENTRYPOINT ["blockyard"]
CMD ["agent", "--host", "0.0.0.0"]
