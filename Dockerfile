# nnU-Net v2 with nnunet_cfcl's trainers. How to use it: docs/how-to/cluster.md
FROM python:3.11.11-slim-bookworm

# torch.compile, nnU-Net's default on GPUs, compiles kernels while it trains
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV nnUNet_raw=/data/nnUNet_raw \
    nnUNet_preprocessed=/data/nnUNet_preprocessed \
    nnUNet_results=/data/nnUNet_results

# whoever owns the data outside decides: docker build --build-arg UID=$(id -u)
ARG UID=1000
RUN useradd --create-home --uid "$UID" nnunet \
    && mkdir -p "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results" \
    && chown -R nnunet /data

COPY pyproject.toml setup.py MANIFEST.in README.md CHANGELOG.md LICENSE CITATION.cff /opt/nnunet_cfcl/
COPY nnunet_cfcl /opt/nnunet_cfcl/nnunet_cfcl
COPY trainers /opt/nnunet_cfcl/trainers

# nnU-Net then finds the trainers by itself, without a variable
RUN pip install --no-cache-dir /opt/nnunet_cfcl \
    && nnunet_cfcl install

VOLUME ["/data/nnUNet_raw", "/data/nnUNet_preprocessed", "/data/nnUNet_results"]

# what matplotlib and numba (UMAP) keep between runs; the installation itself is read-only for the user below
ENV MPLCONFIGDIR=/tmp/matplotlib \
    NUMBA_CACHE_DIR=/tmp/numba \
    PYTHONUNBUFFERED=1

USER nnunet
WORKDIR /home/nnunet
CMD ["nnunet_cfcl", "doctor"]
