# `paligemma serve` in a container, as nobody in particular, with PyTorch for CPUs. The build steps are those of the
# README; docs/serving.md says how to run it.
#
#     docker build -t paligemma .
#     docker run -p 127.0.0.1:8000:8000 -e PALIGEMMA_API_KEY=choose-one paligemma
#
# For NVIDIA GPUs: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t paligemma .
# and docker run --gpus all ...
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV HF_HOME=/models
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir -c constraints.txt torch --index-url "$TORCH_INDEX"
RUN pip install --no-cache-dir -c constraints.txt ".[serve]"
RUN mkdir -p "$HF_HOME" && chmod 1777 "$HF_HOME"
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=300s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000/health')"]
CMD ["paligemma", "serve", "--host", "0.0.0.0"]
