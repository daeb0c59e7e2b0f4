# megalong on NVIDIA's PyTorch image, which brings CUDA, cuDNN, NCCL, apex, Transformer Engine, flash-attn and DALI.
#
#   docker build -t megalong .                                  # INSTALL_VLLM=0 leaves vLLM out
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
#     -v /path/to/checkpoints:/checkpoints -v /path/to/data:/data -v "$PWD/runs":/workspace/megalong/runs megalong \
#     launch/grpo_7b_8xa100.sh /checkpoints/LongVILA-R1-7B /data/train.jsonl
#
# --ipc=host: NCCL talks through shared memory. memlock: pinned host buffers.
# 26.03 is the last of these images with PyTorch 2.11, which vLLM 0.25 is written against.
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${BASE}

ARG VLLM_VERSION=0.25.1
ARG INSTALL_VLLM=1
# sm_80 A100, sm_90 H100 and H200: vLLM's kernels are built for these alone.
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0"
ARG MAX_JOBS=16

# The image's own torch is an alpha of its version ("2.11.0a0"), which the range in setup.py does not admit. So nothing
# may resolve torch: it is pinned to what is there, and megalong itself is installed without dependencies.
RUN python -c "import torch, triton; print(f'torch=={torch.__version__}\ntriton=={triton.__version__}')" \
      > /tmp/image.txt \
 && cp /tmp/image.txt /tmp/constraint.txt

# vLLM's wheel is linked against the released torch, so it is compiled here against the image's.
RUN if [ "${INSTALL_VLLM}" = 1 ]; then \
      git clone --depth 1 --branch v${VLLM_VERSION} https://github.com/vllm-project/vllm /tmp/vllm \
   && cd /tmp/vllm && python use_existing_torch.py \
   && pip install --no-cache-dir -c /tmp/constraint.txt -r requirements/build/cuda.txt \
   && MAX_JOBS=${MAX_JOBS} TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" \
      pip install --no-cache-dir -c /tmp/constraint.txt --no-build-isolation . \
   && rm -rf /tmp/vllm; \
    fi

RUN pip install --no-cache-dir -c /tmp/constraint.txt \
      "megatron-core>=0.16.1,<0.20" "transformers>=5.5,<6" safetensors "omegaconf>=2.3" "av>=17,<20" einops numpy psutil \
      "PyNvVideoCodec>=2.2" "flash-attn-4[cu13]>=4.0.0b16,<4.0.0b20" \
      packaging tqdm matplotlib tensorboard wandb pytest pytest-timeout hypothesis ruff

WORKDIR /workspace/megalong
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .

# A build that swapped torch or lost one of the image's kernels stops here, not in the middle of a run.
RUN python -c "import torch, triton; print(f'torch=={torch.__version__}\ntriton=={triton.__version__}')" \
      | diff /tmp/image.txt - \
 && python -c "import apex, flash_attn, transformer_engine, megatron.core, transformers, av, nvidia.dali; \
      from importlib.util import find_spec; assert find_spec('flash_attn.cute'), 'flash-attn-4'"
