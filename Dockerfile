# elastic-adapters on CPUs. Runs and the cache of converted models are kept in the volume:
#
#     docker build -t elastic-adapters .
#     docker run --rm -it -v "$PWD:/data" --user "$(id -u):$(id -g)" elastic-adapters \
#         train --config demo-train --model.path MODEL
#
# With other extras: --build-arg EXTRAS=gguf,onnx,plots,datasets
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=gguf,onnx,openvino,plots
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/elastic \
    && /opt/elastic/bin/pip install "torch==${TORCH}" --index-url "${TORCH_INDEX}"
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY elastic elastic
COPY configs configs
COPY search_spaces search_spaces
RUN /opt/elastic/bin/pip install ".[${EXTRAS}]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/elastic /opt/elastic
ENV PATH=/opt/elastic/bin:$PATH XDG_CACHE_HOME=/data/.cache HF_HOME=/data/.cache/huggingface
RUN useradd --create-home --uid 1000 elastic && install -d -o elastic -g elastic /data
USER 1000
WORKDIR /data
ENTRYPOINT ["elastic"]
CMD ["--help"]
