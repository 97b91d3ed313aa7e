#!/usr/bin/env bash
# Prove on a machine without a GPU that `python -m bench.gpu` will run on one: a fresh virtual environment with torch,
# triton and transformers as GPU machines have them, the wheels of a folder and pytest, and nothing else; a copy of the
# committed sources that is not installed and not on PYTHONPATH; the whole smoke run; the tests that need no GPU.
# Usage: bench/gpu_environment.sh WHEELS FOLDER [PYTEST_ARGUMENT ...]
#   WHEELS    folder of wheels, as a GPU machine gets them: omegaconf, PyAV, liger-kernel, TRL, DeepSpeed and the like
#   FOLDER    where the environment and the copy are made
#   PYTHON    environment variable: the interpreter, python3.12 by default
set -euo pipefail
wheels=$(realpath -e "${1:?usage: bench/gpu_environment.sh WHEELS FOLDER}")
folder=$(realpath "${2:?usage: bench/gpu_environment.sh WHEELS FOLDER}")
root=$(realpath "$(dirname "$0")/..")
shift 2
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

"${PYTHON:-python3.12}" -m venv "$folder/venv"
python="$folder/venv/bin/python"
# Without a GPU the Triton programs are interpreted, and the interpreter of Triton 3.6 takes arrays of one element for
# numbers, which NumPy 2.4 refuses. No GPU machine interprets, so none needs the limit.
"$python" -m pip install --quiet torch==2.11.0 torchvision==0.26.0 triton==3.6.0 transformers==5.17.0 "numpy<2.4"
"$python" -m pip install --quiet pytest pytest-benchmark pytest-xdist hypothesis  # to run the tests with
"$python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl
"$python" -m pip freeze

rm -rf "$folder/clone"
git clone --quiet "$root" "$folder/clone"
cd "$folder/clone"
"$python" -m bench.gpu --smoke
"$python" -m pytest -m "not gpu" -n 2 --dist loadfile -p no:cacheprovider "$@"
