#!/usr/bin/env bash
# Installs packages of Debian or Ubuntu on a node that has just come up, whose own first updates may still hold apt's locks.
#
#   bash ~/uipe-search/deploy/apt_install.sh PACKAGE ...
set -euo pipefail
root() { if test "$(id -u)" = 0; then "$@"; else sudo "$@"; fi; }
apt() { root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout="${APT_LOCK_SECONDS:-600}" "$@"; }

if command -v cloud-init > /dev/null; then cloud-init status --wait > /dev/null || true; fi

# apt waits for the lock of dpkg by that option. The lock of its lists it does not wait for.
ends=$((SECONDS + ${APT_LOCK_SECONDS:-600}))
until apt update; do
  if test "$SECONDS" -ge "$ends"; then echo "apt-get update failed for ${APT_LOCK_SECONDS:-600} s" >&2; exit 1; fi
  sleep 5
done
apt install -y --no-install-recommends "$@"
