#!/usr/bin/env bash
# Prove on a machine without a GPU that `python -m bench.gpu` will run on one: a fresh virtual environment with torch,
# triton and transformers as GPU machines have them, the wheels of a folder and pytest, and nothing else; a copy of the
# committed sources that is not installed and not on PYTHONPATH; the whole smoke run; the tests that need no GPU.
# Usage: bench/gpu_environment.sh WHEELS [FOLDER [PYTEST_ARGUMENT ...]]
#   WHEELS    folder of wheels, as a GPU machine gets them: omegaconf, PyAV, liger-kernel, TRL, DeepSpeed and the like
#   FOLDER    where the environment and the copy are made; a temporary one, removed at the end, if it is left out
#   PYTHON    environment variable: the interpreter, python3.12 by default
set -euo pipefail
wheels=$(realpath -e "${1:?usage: bench/gpu_environment.sh WHEELS [FOLDER [PYTEST_ARGUMENT ...]]}")
root=$(realpath "$(dirname "$0")/..")
folder=${2:-}
if test -z "$folder"; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
folder=$(realpath "$folder")
shift $(($# < 2 ? $# : 2))
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

"${PYTHON:-python3.12}" -m venv "$folder/venv"
python="$folder/venv/bin/python"
# Without a GPU the Triton programs are interpreted, and the interpreter of Triton 3.6 takes arrays of one element for
# numbers, which NumPy 2.4 refuses. No GPU machine interprets, so none needs the limit.
"$python" -m pip install --quiet torch==2.11.0 torchvision==0.26.0 triton==3.6.0 transformers==5.17.0 "numpy<2.4"
"$python" -m pip install --quiet pytest pytest-xdist hypothesis  # to run the tests with
"$python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl
"$python" -m pip freeze

rm -rf "$folder/clone"
git clone --quiet "$root" "$folder/clone"
cd "$folder/clone"
smoke=0 tests=0
"$python" -m bench.gpu --smoke || smoke=$?
"$python" -m pytest -m "not gpu" -n 2 --dist loadfile -p no:cacheprovider "$@" || tests=$?
echo "== $(git rev-parse --short=7 HEAD), $("$python" -c 'import torch, triton, transformers
print(f"torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}")')"
echo "smoke run: exit code $smoke"
echo "tests that need no GPU${*:+ ($*)}: exit code $tests"
test "$smoke" = 0 && test "$tests" = 0
