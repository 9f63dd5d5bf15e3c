# CPU by default; with CUDA:  docker build --build-arg TORCH=cuda -t eeg-to-image .
#   docker run --rm -v "$PWD/demo_output:/work/demo_output" eeg-to-image demo.py
#   docker run --rm --gpus all -v DATA:/data -v OUT:/out eeg-to-image train.py --data_path /data ...
# Linted (hadolint), not built: no Docker was at hand. What is tested is the Makefile's installation.
FROM python:3.12-slim

ARG TORCH=cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

WORKDIR /work
COPY requirements.txt .
# torch and torchvision in one command, of one index: their builds must match; versions are those
# that requirements.txt allows, as everywhere
# hadolint ignore=DL3013
RUN if [ "$TORCH" = cpu ]; then \
        pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu; \
    fi \
    && pip install -r requirements.txt

COPY . .
RUN useradd --create-home --uid 1000 researcher && chown researcher /work
USER 1000

ENTRYPOINT ["python"]
CMD ["demo.py"]
