#!/usr/bin/env bash
# Installs this project from its own pinned versions into ~/uipe-venv. Run again, it installs only what has changed.
#
#   bash ~/uipe-search/deploy/set_up_node.sh [PACKAGE ...]      # PACKAGE: what only this node needs, for example boto3
#
# torch is the build that PyPI has for this machine: on x86-64 Linux the one with CUDA, at the version in constraints.txt. For
# another CUDA version set PIP_EXTRA_INDEX_URL (https://download.pytorch.org/whl/...): a pin also takes 2.13.0+cu130.
set -euo pipefail
project="$(cd "$(dirname "$0")/.." && pwd)"
venv="$HOME/uipe-venv"

# The distribution's Python may be another: uv brings 3.11, the version this project is tested with.
if ! test -x "$venv/bin/python"; then
  python3 -m venv "$HOME/uipe-uv"
  "$HOME/uipe-uv/bin/pip" install --quiet "uv==0.13.9"
  "$HOME/uipe-uv/bin/uv" venv --quiet --seed --python 3.11 "$venv"
fi
"$venv/bin/pip" install --quiet --constraint "$project/constraints.txt" "$project" "$@"

# A torch that does not see the GPU is found out here, and not in the middle of a study.
if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null; then
  "$venv/bin/python" -c 'import sys, torch; sys.exit(
    None if torch.cuda.is_available() else f"torch {torch.__version__} does not see the GPU: see docs/clusters.md, torch"
  )'
fi
