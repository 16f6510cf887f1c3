#!/bin/sh
# Tests on ARM64: a small Debian for arm64 under user-mode emulation (qemu-user-static, debootstrap, binfmt-support), as root.
# Slow. ARM_ROOT is where it is made and kept; MIRROR a Debian mirror, if not debootstrap's own; TORCH= leaves torch out.
# Wheels come through the pip of this machine, into ARM_ROOT/wheels; inside there is no network.
set -eu
cd "$(dirname "$0")/.."
root=${ARM_ROOT:-/var/tmp/thimble-arm64}
packages="numpy numba llvmlite tokenizers jinja2 markupsafe PyYAML pytest pluggy iniconfig packaging"
torch=${TORCH-torch==2.13.0 typing-extensions sympy mpmath networkx filelock fsspec}
tests=${ARM_TESTS:-tests/core tests/files tests/data}

for tool in debootstrap qemu-aarch64-static update-binfmts; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install qemu-user-static debootstrap binfmt-support"; exit 2; }
done
binfmt=/proc/sys/fs/binfmt_misc
[ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt
[ -e $binfmt/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64

if [ ! -e "$root/made" ]; then
  debootstrap --arch=arm64 --variant=minbase --include=python3,python3-pip bookworm "$root" ${MIRROR:-}
  touch "$root/made"
fi
wanted="$packages $torch"
if [ "$(cat "$root/wanted" 2>/dev/null)" != "$wanted" ]; then
  # shellcheck disable=SC2086  # one word for each package
  .venv/bin/python -m pip download --quiet --dest "$root/wheels" --no-deps --only-binary=:all: --python-version 3.11 \
    --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux_2_28_aarch64 $wanted
  chroot "$root" sh -c 'python3 -m pip install --quiet --break-system-packages --no-index --no-deps /wheels/*.whl'
  echo "$wanted" >"$root/wanted"
fi
rm -rf "$root/thimble"
mkdir "$root/thimble"
tar -c --exclude=__pycache__ pyproject.toml src tests | tar -x -C "$root/thimble"
inside="cd /thimble && export PYTHONPATH=src OMP_NUM_THREADS=1 HOME=/root && uname -m"
chroot "$root" sh -c "$inside && python3 -m pytest -q -p no:cacheprovider -m 'not slow' --ignore-glob='*stress*' $tests"
if [ -n "$torch" ]; then
  chroot "$root" sh -c "$inside && python3 -m thimble train tests/arm.jsonl --base tests/fixtures/gguf/smollm2.gguf \
    --out /tmp/run-\$\$ --max-steps 3 --compute fp32 --rank 4 --seq-len 64 --batch-tokens 64 --eval-rows 0"
fi
