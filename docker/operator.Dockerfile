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
# --no-deps: the dependencies in the wheel are those of the agent, torch among them. tests/test_images.py checks that
# operator-requirements.txt is complete.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --compile -r /requirements.txt \
    && pip install --no-cache-dir --compile --no-deps /wheels/*.whl
# A number, not a name, so that the kubelet can check runAsNonRoot.
USER 65532:65532
WORKDIR /
EXPOSE 8080
ENTRYPOINT ["python", "-m", "blockyard.operator.main"]
