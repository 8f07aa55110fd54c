"""ComfyUI graphs as plain data: the format files are saved in, the format a server runs, and changes to the latter.

A saved workflow (UI format) lists nodes with positions and links; a server wants `{node id: {class_type, inputs}}`
(API format). Both are JSON dictionaries; `object_info` is a server's own description of its nodes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from .registry import unknown


Graph = dict[str, dict[str, Any]]
ObjectInfo = Mapping[str, Mapping[str, Any]]

_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "COMFY_DYNAMICCOMBO_V3")
_SEED_CONTROL = ("fixed", "increment", "decrement", "randomize")
_VIRTUAL = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
_MUTED, _BYPASSED = 2, 4
_MODEL_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".gguf")


def is_ui_format(workflow: Mapping[str, Any]) -> bool:
    """Whether a workflow is in the format the page saves (as opposed to the one a server runs)."""
    return isinstance(workflow.get("nodes"), list)


def _is_widget(spec: list) -> bool:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    return (isinstance(kind, list) or kind in _WIDGETS) and not options.get("forceInput")


def _specs(inputs: Mapping[str, Mapping[str, list]]) -> Iterator[tuple[str, list]]:
    for group in ("required", "optional"):
        yield from (inputs.get(group) or {}).items()


def _read_widgets(inputs: Mapping[str, Any], values: list, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of every widget, consuming `values`, the list a saved node keeps in the order of its widgets."""
    for name, spec in _specs(inputs):
        if not _is_widget(spec) or not values:
            continue
        value = values.pop(0)
        yield prefix + name, value
        options = spec[1] if len(spec) > 1 else {}
        if spec[0] == "COMFY_DYNAMICCOMBO_V3":
            chosen: dict[str, Any] = next((o["inputs"] for o in options["options"] if o["key"] == value), {})
            yield from _read_widgets(chosen, values, f"{prefix}{name}.")
        # Widgets that only the page has: what happens to a seed after a run, and an upload button.
        is_control = options.get("control_after_generate") and values and values[0] in _SEED_CONTROL
        if is_control or ((options.get("image_upload") or options.get("video_upload")) and values):
            values.pop(0)


class _SavedGraph:
    """Follows links of a saved workflow through the nodes that exist only on the page."""

    def __init__(self, workflow: Mapping[str, Any]):
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links = {}
        for link in workflow.get("links", []):
            if isinstance(link, Mapping):
                link = [link["id"], link["origin_id"], link["origin_slot"]]
            self.links[link[0]] = (link[1], link[2])

    def source(self, link_id: int | None) -> Any:
        """`[node id, output]`, the constant of a primitive, or None where the link leads nowhere."""
        if link_id is None or link_id not in self.links:
            return None
        node_id, slot = self.links[link_id]
        node = self.nodes[node_id]
        if node["type"] == "PrimitiveNode":
            return node["widgets_values"][0]
        if node["type"] == "Reroute":
            return self.source(node["inputs"][0].get("link"))
        if node.get("mode") == _MUTED:
            return None
        if node.get("mode") == _BYPASSED:
            return self.source(_bypass_link(node, slot))
        return [str(node_id), slot]


def _bypass_link(node: Mapping[str, Any], slot: int) -> int | None:
    """The input a bypassed node hands through to its output `slot`: the first one of the same type."""
    kind = node["outputs"][slot]["type"]
    return next((i.get("link") for i in node.get("inputs", []) if i["type"] == kind and i.get("link")), None)


def to_api(workflow: Mapping[str, Any], object_info: ObjectInfo) -> Graph:
    """The graph a server runs, from a workflow saved by the page.

    Args:
        workflow: UI format as read from the file. API format is returned as a copy.
        object_info: The server's answer to `/object_info`.

    Raises:
        ValueError: The workflow uses node types the server lacks, or subgraphs (export those as API format).
    """
    if not is_ui_format(workflow):
        return copy.deepcopy(dict(workflow))
    if (workflow.get("definitions") or {}).get("subgraphs"):
        raise ValueError("the workflow contains subgraphs: open it in ComfyUI and save it with 'Export (API)'")
    saved = _SavedGraph(workflow)
    live = [n for n in workflow["nodes"] if n["type"] not in _VIRTUAL and n.get("mode") not in (_MUTED, _BYPASSED)]
    require_nodes((n["type"] for n in live), object_info)
    return {str(node["id"]): _to_api_node(node, saved, object_info) for node in live}


def _to_api_node(node: Mapping[str, Any], saved: _SavedGraph, object_info: ObjectInfo) -> dict[str, Any]:
    values = node.get("widgets_values") or []
    schema = object_info[node["type"]]["input"]
    inputs = dict(values) if isinstance(values, Mapping) else dict(_read_widgets(schema, list(values)))
    for slot in node.get("inputs", []):
        source = saved.source(slot.get("link"))
        if source is not None:
            inputs[slot["name"]] = source
    return {"class_type": node["type"], "inputs": inputs}


def require_nodes(types, object_info: ObjectInfo) -> None:
    """Raise `ValueError` naming the node types a server lacks."""
    missing = sorted(set(types) - set(object_info))
    if missing:
        raise ValueError(
            f"this ComfyUI lacks the node types {', '.join(missing)}: install the pack they belong to "
            "(DX nodes: put this repository into its custom_nodes folder) and start it again"
        )


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def substitute(graph: Graph, substitutions: Mapping[str, Any], object_info: ObjectInfo) -> Graph:
    """A copy of an API graph with other values or other nodes in place.

    Args:
        graph: API format.
        substitutions: Each key is a node type or an input value. A key that maps to a dictionary changes every node
            of that type: `{"inputs": {...}}` sets inputs, and with a `"class_type"` the node is replaced by one of
            that type, its outputs reconnected by their type. A key that maps to anything else replaces equal input
            values, e.g. `{"v1-5-pruned-emaonly-fp16.safetensors": "tiny.safetensors"}`.

    Raises:
        ValueError: A replacement has no output of a type that is used.
    """
    graph = copy.deepcopy(graph)
    replaced = {}
    for node_id, node in graph.items():
        change = substitutions.get(node["class_type"])
        if isinstance(change, Mapping):
            if "class_type" in change:
                replaced[node_id] = node["class_type"]
                node.update(class_type=change["class_type"], inputs={})
            node["inputs"].update(change.get("inputs", {}))
    for node in graph.values():
        for name, value in node["inputs"].items():
            if _is_link(value):
                if value[0] in replaced:
                    old, new = object_info[replaced[value[0]]], object_info[graph[value[0]]["class_type"]]
                    node["inputs"][name] = [value[0], _same_output(old, new, value[1])]
            elif isinstance(value, str) and isinstance(substitutions.get(value, {}), (str, int, float)):
                node["inputs"][name] = substitutions[value]
    return graph


def _same_output(old: Mapping[str, Any], new: Mapping[str, Any], slot: int) -> int:
    kind = old["output"][slot]
    if kind not in new["output"]:
        raise ValueError(f"{new['name']} has no {kind} output, so it cannot replace {old['name']}")
    return new["output"].index(kind)


def set_values(graph: Graph, values: Mapping[str, str]) -> Graph:
    """A copy of an API graph with other values under names a person would type.

    Args:
        graph: API format.
        values: Name -> new value as text. A name is a value the graph holds, such as a model file (all equal ones are
            replaced), an input (`"steps"`), or an input of one node type (`"KSampler.steps"`).

    Raises:
        ValueError: Nothing in the graph has that name, or an input that holds a number is given a text.
    """
    graph = copy.deepcopy(graph)
    for name, text in values.items():
        plain = [(node, key) for node in graph.values() for key, v in node["inputs"].items() if not _is_link(v)]
        places = [(node, key) for node, key in plain if node["inputs"][key] == name]
        places = places or [(node, key) for node, key in plain if name in (key, f"{node['class_type']}.{key}")]
        if not places:
            files = {v for node, key in plain if _is_file(v := node["inputs"][key])}
            raise ValueError(unknown("value", name, files | {f"{node['class_type']}.{key}" for node, key in plain}))
        for node, key in places:
            node["inputs"][key] = _like(node["inputs"][key], text, name)
    return graph


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(_MODEL_FILES)


def _like(old: Any, text: str, name: str) -> Any:
    """`text` as what `old` is: a truth value, a number or a text."""
    if isinstance(old, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} is {text!r}; accepted: true, false")
        return text.lower() == "true"
    if not isinstance(old, (int, float)):
        return text
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise ValueError(f"{name} is {text!r}; a number is needed")


def shapes_substitutions(model: str, size: int = 64) -> dict[str, Any]:
    """Substitutions that run a workflow on a shipped model instead of the public one it names.

    The shipped models are made for 64 x 64 pixels and a guidance of 3.

    Args:
        model: `"shapes-unet"`, `"shapes-unet-eps"` or `"shapes-dit"`.
        size: Height and width of empty latents in pixels.
    """
    loader = {"class_type": "DXLoadShapes", "inputs": {"model": model}}
    loaders = ("CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader")
    latents = ("EmptyLatentImage", "EmptySD3LatentImage")
    guided = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "CFGGuider")
    return {
        **dict.fromkeys(loaders, loader),
        **{name: {"inputs": {"width": size, "height": size}} for name in latents},
        **{name: {"inputs": {"cfg": 3.0}} for name in guided},
    }


def set_prompt(graph: Graph, text: str, negative: str | None = None) -> Graph:
    """A copy of an API graph whose positive prompts read `text`, and its negative ones `negative` where that is given.

    Positive are all texts except those that reach only inputs called `negative`, directly or through other
    conditioning nodes.
    """
    graph = copy.deepcopy(graph)
    for node_id, node in graph.items():
        if "text" in node["inputs"] and "clip" in node["inputs"]:
            wanted = negative if _is_negative(graph, node_id) else text
            node["inputs"]["text"] = node["inputs"]["text"] if wanted is None else wanted
    return graph


def _is_negative(graph: Graph, node_id: str) -> bool:
    uses = [
        (user, name)
        for user, node in graph.items()
        for name, value in node["inputs"].items()
        if _is_link(value) and value[0] == node_id
    ]
    return bool(uses) and all(
        name == "negative" or (name == "conditioning" and _is_negative(graph, user)) for user, name in uses
    )


def for_shapes(workflow: Mapping[str, Any], object_info: ObjectInfo, caption: str | None = None) -> Graph:
    """The API graph of a shipped workflow, on a shipped model in place of the public one it names.

    A workflow may say what stands in for what under `extra.diffusers_ext`: `"model"` (null keeps its own loaders) and
    `"substitutions"`. Otherwise graphs with a separate diffusion model run on `shapes-dit`, the rest on a shapes UNet.

    Args:
        workflow: UI format.
        object_info: The server's answer to `/object_info`.
        caption: Text for the positive prompts, with empty negative ones, unless the workflow's own substitutions name
            a prompt.
    """
    settings = (workflow.get("extra") or {}).get("diffusers_ext", {})
    graph = to_api(workflow, object_info)
    model = settings.get("model", _stand_in(graph))
    own = settings.get("substitutions", {})
    texts = {node["inputs"].get("text") for node in graph.values()}
    graph = substitute(graph, {**(shapes_substitutions(model) if model else {}), **own}, object_info)
    return graph if caption is None or texts & set(own) else set_prompt(graph, caption, negative="")


def _stand_in(graph: Graph) -> str:
    """The shipped model nearest to the one a graph loads; Stable Diffusion 1.5 checkpoints predict epsilon."""
    from .zoo import names

    if any(node["class_type"] == "UNETLoader" for node in graph.values()):
        return "shapes-dit"
    return "shapes-unet-eps" if "shapes-unet-eps" in names() else "shapes-unet"
