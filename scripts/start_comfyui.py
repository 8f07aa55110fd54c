"""Start ComfyUI with this repository as a pack and print the URL; Ctrl-C stops it."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from diffusers_ext.comfy_client import start_server


REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_DIR", REPOSITORY / ".comfy/ComfyUI"))
    parser.add_argument("--base", default=REPOSITORY / ".comfy/base", help="models, input, output and user data")
    parser.add_argument("--port", type=int, default=8188)
    args = parser.parse_args()
    with start_server(args.comfyui, base_directory=args.base, pack=REPOSITORY, port=args.port) as server:
        print(f"\nComfyUI with diffusers-ext: {server.url}\nModels belong into {args.base}/models", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.process.wait()


if __name__ == "__main__":
    main()
