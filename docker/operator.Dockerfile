# The operator: Python and a handful of packages, no torch.
#   docker build -f docker/operator.Dockerfile -t blockyard-operator:0.1.0 .
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
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY docker/operator-requirements.txt /requirements.txt
# --no-deps: the wheel's own dependencies are the agent's. tests/test_images.py keeps the list complete.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --compile -r /requirements.txt \
    && pip install --no-cache-dir --compile --no-deps /wheels/*.whl
# A number, so that runAsNonRoot can be checked.
USER 65532:65532
WORKDIR /
EXPOSE 8080
ENTRYPOINT ["python", "-m", "blockyard.operator.main"]
