#!/bin/sh
# Tests on ARM64, as root: a small Debian for arm64 under user-mode emulation. Needs debootstrap, qemu-user-static and
# binfmt-support. Packages are unpacked by this machine, so that nothing but the tests is emulated; no network inside.
# ARM_ROOT is where it is made and kept, MIRROR a Debian mirror if not debootstrap's own, ARM_TESTS what is run.
# TORCH may name a CPU build of torch for aarch64 and what it needs; then three steps of a run follow. (The wheel on the
# package index is a CUDA build.)
set -eu
cd "$(dirname "$0")/.."
root=${ARM_ROOT:-/var/tmp/thimble-arm64}
packages="numpy numba llvmlite tokenizers huggingface-hub jinja2 markupsafe PyYAML pytest pluggy iniconfig packaging pygments"
torch=${TORCH:-}

for tool in debootstrap qemu-aarch64-static update-binfmts; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install debootstrap qemu-user-static binfmt-support"; exit 2; }
done
binfmt=/proc/sys/fs/binfmt_misc
[ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt
[ -e $binfmt/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64

if [ ! -e "$root/made" ]; then
  # shellcheck disable=SC2086  # no word if there is no mirror
  [ -d "$root/debs" ] || debootstrap --download-only --arch=arm64 --variant=minbase --include=python3 bookworm "$root/debs" ${MIRROR:-}
  mkdir -p "$root/usr/bin" "$root/usr/sbin" "$root/usr/lib" "$root/tmp" "$root/proc" "$root/dev"
  for folder in bin sbin lib; do ln -sfn "usr/$folder" "$root/$folder"; done
  for deb in "$root"/debs/var/cache/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C "$root"
  done
  touch "$root/made" "$root/dev/null"
fi
wanted="$packages $torch"
if [ "$(cat "$root/wanted" 2>/dev/null)" != "$wanted" ]; then
  rm -rf "$root/site"
  # shellcheck disable=SC2086  # a word for each package
  .venv/bin/python -m pip install --quiet --target "$root/site" --no-deps --only-binary=:all: --python-version 3.11 \
    --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux_2_28_aarch64 $wanted
  echo "$wanted" >"$root/wanted"
fi
rm -rf "$root/thimble"
mkdir "$root/thimble"
tar -c --exclude=__pycache__ pyproject.toml src tests | tar -x -C "$root/thimble"
# Files whose peers (torch, PEFT, transformers ...) have no place here are left out, and named.
all=$(find ${ARM_TESTS:-tests/core tests/files tests/data} -name 'test_*.py' | sort)
peers='^ *(import|from) (torch|peft|transformers|safetensors|gguf|pyarrow|datasets|families|samples)|thimble.backends.torch'
tests=$([ -n "$torch" ] && echo "$all" || grep -LE "$peers" $all)
echo "left out: $(echo "$all" | grep -vxF "$tests" | tr '\n' ' ')"
run="cd /thimble && export PYTHONPATH=/thimble/src:/thimble/tests:/site HOME=/tmp OMP_NUM_THREADS=1 && uname -m && python3"
chroot "$root" /bin/sh -c "$run -m pytest -q -p no:cacheprovider -m 'not slow' $(echo "$tests" | tr '\n' ' ')"
if [ -n "$torch" ]; then
  rows='import json; [print(json.dumps({"prompt": f"say {n} ", "completion": f"{n} it is"})) for n in range(12)]'
  .venv/bin/python -c "$rows" >"$root/thimble/rows.jsonl"
  chroot "$root" /bin/sh -c "$run -m thimble train rows.jsonl --base tests/fixtures/gguf/smollm2.gguf --out run --max-steps 3 \
    --compute fp32 --rank 4 --seq-len 64 --batch-tokens 64 --eval-rows 0"
fi
