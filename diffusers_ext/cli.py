"""`diffusers-ext`: the catalogue from a terminal.

Commands print to stdout and return 0; what goes wrong is one line on stderr and a non-zero exit code.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .registry import MethodRecord, get_method, list_methods, unknown


__all__ = ["main", "preflight", "workflow_path"]

_PACKAGE = Path(__file__).parent
_CHECKOUT = _PACKAGE.parent
REPOSITORY = "https://github.com/diffusers-ext/diffusers-ext"


def workflow_path(name: str) -> Path:
    """File of a shipped ComfyUI workflow.

    Args:
        name: Slug such as `"deepcache"`, or the path of any workflow file.

    Raises:
        ValueError: No such file and no shipped workflow of that name; the message names the nearest one.
    """
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ValueError(f"there is no file {name}; give a workflow file, or one of: {', '.join(_workflows())}")
        return Path(name)
    files = _workflows()
    if name not in files:
        raise ValueError(unknown("workflow", name, files))
    return files[name]


def _workflows() -> dict[str, Path]:
    """Shipped workflows by name: beside the package in a checkout, inside it when installed from a wheel."""
    folders = (_PACKAGE / "_workflows", _CHECKOUT / "workflows")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def _quiet() -> None:
    """Loading bars and import notices of the libraries would bury what a command prints."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _load_model(name: str) -> Any:
    from diffusers import DiffusionPipeline

    from . import zoo

    folder = Path(name)
    if not folder.exists():
        if any(sep in name for sep in "/\\."):
            raise ValueError(f"there is no model folder {name}; give a folder saved by save_pretrained, or a zoo name")
        return zoo.load(name)
    if (folder / "manifest.json").is_file():
        return zoo.load_folder(folder)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{name} holds no model_index.json: give the folder that save_pretrained wrote")
    try:
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = _one_line(error)
        raise ValueError(
            f"cannot load {name}: {reason}. Files are missing or damaged: save or fetch it again"
        ) from error


def _prediction(pipe: Any) -> str:
    """Prediction type of a pipeline as records name it."""
    config = pipe.scheduler.config
    if "prediction_type" in config and not config.get("use_flow_sigmas"):
        return config["prediction_type"]
    return "flow_prediction"


def preflight(record: MethodRecord, pipe: Any, num_inference_steps: int | None = None):
    """Would this method work on this pipeline? Nothing is changed.

    Args:
        record: Method of the catalogue.
        pipe: `DiffusionPipeline`.
        num_inference_steps: Steps of the planned run.

    Returns:
        `diffusers_ext.Preflight` with `ok`, `errors` and `warnings`.
    """
    from .apply import MethodConfig, Preflight, check

    public = record.public
    kinds = {"unet"} if getattr(pipe, "unet", None) is not None else {"dit", "mmdit", "video"}
    if not {"any", *kinds} & set(record.targets):
        targets = ", ".join(record.targets)
        return Preflight(
            (f"{type(pipe).__name__} has no denoiser that {record.slug} supports; it supports: {targets}",)
        )
    if issubclass(public, MethodConfig):
        return check(pipe, public(), num_inference_steps=num_inference_steps)
    prediction = _prediction(pipe)
    if prediction not in record.predictions:
        accepted = ", ".join(record.predictions)
        return Preflight((f"{record.slug} does not support {prediction} models; it supports: {accepted}",))
    try:
        if record.kind == "scheduler":
            public.from_config(pipe.scheduler.config)
        elif record.kind == "pipeline":
            public.from_pipe(pipe)
    except (ValueError, TypeError) as error:
        return Preflight((_one_line(error),))
    return Preflight()


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _list(args: argparse.Namespace) -> int:
    everything = list_methods()
    for field in ("family", "kind"):
        given, known = getattr(args, field), {getattr(r, field) for r in everything}
        if given is not None and given not in known:
            raise ValueError(unknown(field, given, known))
    chosen = list_methods(family=args.family, kind=args.kind)
    rows = [(r.slug, r.family, r.kind, r.summary) for r in chosen]
    print(_table([("METHOD", "FAMILY", "KIND", "WHAT YOU GET"), *rows]) if rows else "no method matches both filters")
    return 0


def _show(args: argparse.Namespace) -> int:
    record = get_method(args.slug)
    rows = [
        ("paper", f"{record.title}, {record.paper_url}"),
        ("what", record.summary),
        ("family", f"{record.family} ({record.kind})"),
        ("python", f"diffusers_ext.{record.public.__name__}"),
        ("targets", ", ".join(record.targets)),
        ("predictions", ", ".join(record.predictions)),
        ("not with", ", ".join(record.conflicts) or "-"),
        ("nodes", ", ".join(record.nodes)),
        ("workflow", record.workflow),
        ("docs", record.docs),
        ("claim", str(record.claim)),
    ]
    print(_table([(record.slug, ""), *rows]))
    return 0


def _check(args: argparse.Namespace) -> int:
    record = get_method(args.slug)
    _quiet()
    answer = preflight(record, _load_model(args.model), args.steps)
    for warning in answer.warnings:
        print(f"warning: {warning}")
    if not answer.ok:
        raise ValueError(f"{record.slug} cannot run on {args.model}: {'; '.join(answer.errors)}")
    print(f"{record.slug} runs on {args.model}")
    return 0


def _writable(folder: str) -> Path:
    """Create an output folder, so that a command fails before its work and not after."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    _quiet()
    demo.run(_writable(args.out), quick=args.quick, fresh=args.fresh, sheet=args.sheet and Path(args.sheet))
    return 0


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--set is {text!r}; give NAME=VALUE, e.g. steps=8 or public.safetensors=mine.safetensors")
    return name, value


def _run(args: argparse.Namespace) -> int:
    from .comfy_client import run_workflow

    path, out = workflow_path(args.workflow), _writable(args.out)
    values = dict(_pair(text) for text in args.set)
    where = {"url": args.url, "comfyui": args.comfyui}
    pictures = run_workflow(path, **where, output_dir=out, values=values, prompt=args.prompt)
    print("\n".join(str(path) for path in pictures))
    return 0


def _calibration_data(pipe: Any, args: argparse.Namespace) -> tuple[Any, list[str], str]:
    """Pictures, captions and their name: a folder of the user, or scenes of the world the shipped models draw."""
    from . import zoo
    from .schedulers._ems import DATA
    from .schedulers._pictures import read_captioned

    count = args.latents or DATA
    if args.data is not None:
        return *read_captioned(pipe, args.data, args.size, count), Path(args.data).resolve().name
    if args.model not in zoo.names():
        raise ValueError(f"{args.model} is not a shipped model: give pictures with captions as --data FOLDER")
    scenes = zoo.held_out(count)
    return scenes.images, list(scenes.captions), "shapes held-out"


def _calibrate(args: argparse.Namespace) -> int:
    from . import calibrate_ems, clean_latents
    from .schedulers._ems import GRID

    path = Path(args.file)
    _writable(str(path.parent))
    _quiet()
    pipe = _load_model(args.model)
    images, captions, dataset = _calibration_data(pipe, args)
    options = {"num_grid": args.grid or GRID, "reduce": args.reduce, "estimator": args.estimator, "dataset": dataset}
    options["checkpoint"] = path.with_name(path.name + ".unfinished")
    calibrate_ems(pipe, clean_latents(pipe, images), captions, args.guidance_scale, **options).save(path)
    print(path)
    return 0


def _bench(args: argparse.Namespace) -> int:
    script = _CHECKOUT / "benchmarks" / "run.py"
    if not script.is_file():
        raise ValueError(f"benchmarks are not part of the installed package: clone {REPOSITORY} and run it there")
    return runpy.run_path(str(script))["main"]([args.slug])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffusers-ext", description="Diffusion papers as drop-in methods.")
    parser.add_argument("--version", action="version", version=f"diffusers-ext {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    sub = command("list", _list, "list the methods of the catalogue")
    sub.add_argument("--family", help="only this family, e.g. caching")
    sub.add_argument("--kind", help="only this kind, e.g. scheduler")
    command("show", _show, "show everything about one method").add_argument("slug")
    sub = command("check", _check, "would a method work on a model?")
    sub.add_argument("slug")
    sub.add_argument("model", help="folder saved by save_pretrained, or shapes-unet | shapes-unet-eps | shapes-dit")
    sub.add_argument("--steps", type=int, help="steps of the planned run")
    sub = command("demo", _demo, "render with the shipped models and compare the methods; continues where it stopped")
    sub.add_argument("--out", default="outputs/demo", help="folder of the pictures (default: %(default)s)")
    sub.add_argument("--quick", action="store_true", help="fewer pictures")
    sub.add_argument("--fresh", action="store_true", help="forget finished rows and start again")
    sub.add_argument("--sheet", help="also write the contact sheet to this PNG file")
    sub = command("run", _run, "run a ComfyUI workflow and save its pictures")
    sub.add_argument("workflow", help="name of a shipped workflow, or a file")
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--comfyui", help="ComfyUI folder to start a server from")
    where.add_argument("--url", help="address of a running server, e.g. http://127.0.0.1:8188")
    sub.add_argument("--out", default="outputs", help="folder of the pictures (default: %(default)s)")
    sub.add_argument("--prompt", help="text for the positive prompts")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace a value, such as a model file by yours, or set an input (steps, or KSampler.steps); repeatable",
    )
    sub = command("calibrate", _calibrate, "measure the statistics that DPM-Solver-v3 samples with")
    sub.add_argument("model", help="shapes-unet | shapes-unet-eps | shapes-dit, or a folder saved by save_pretrained")
    sub.add_argument("file", help="safetensors file to write")
    sub.add_argument("--data", help="folder of pictures, each with a caption in a text file of the same name")
    sub.add_argument("--size", type=int, help="side of the pictures in pixels (default: the model's)")
    sub.add_argument("--latents", type=int, help="at most so many pictures, about 50 or more")
    sub.add_argument("--guidance-scale", type=float, default=3.0, help="that of sampling (default: %(default)s)")
    sub.add_argument("--grid", type=int, help="noise levels, minus one")
    sub.add_argument(
        "--reduce", default="scalar", help="a curve for all (scalar, default), per channel or per element"
    )
    sub.add_argument("--estimator", default="fd", help="differences (fd, default) or exact derivatives (jvp)")
    command("bench", _bench, "measure a method beside its peers").add_argument(
        "slug", help="method, solvers (all schedulers side by side), or all"
    )
    return parser


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(text.split())[:600].rstrip(". ")


def _failed(message: str, code: int = 1) -> int:
    print(f"diffusers-ext: {message}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code (0 done, 1 failed, 130 interrupted; usage errors exit with 2)."""
    args = _parser().parse_args(argv)
    try:
        return args.function(args)
    except KeyboardInterrupt:
        print(
            "diffusers-ext: interrupted; run the same command again (demo continues where it stopped)", file=sys.stderr
        )
        return 130
    except PermissionError as error:
        print(
            f"diffusers-ext: no permission to write {error.filename}: choose another place, e.g. --out",
            file=sys.stderr,
        )
        return 1
    except Exception as error:
        if args.traceback:
            raise
        expected = isinstance(error, (ValueError, TypeError, RuntimeError, OSError, ImportError))
        hint = "" if expected else f" ({type(error).__name__}; diffusers-ext --traceback ... shows where)"
        print(f"diffusers-ext: {_one_line(error)}{hint}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
