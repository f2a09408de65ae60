"""The network as a drawing: channel groups as colours (`compressor inspect --graph FILE.svg`).

Top to bottom in the order of computation, a node per layer and per op that joins or splits; chains of
element-wise ops are left out. A node has the colour of the channels that it makes, an edge that of the channels
that it carries; what is frozen is grey. Every node has a tooltip with its group, width and reason.
"""

import colorsys
from collections.abc import Mapping
from html import escape

from torch import fx

from compressor.passes.channels.analyze import ChannelGraph
from compressor.passes.tracing.shapes import shapes_of

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 190, 26, 16, 18
_FROZEN = "#d0d4da"
_MANY = {"cat", "split", "split_with_sizes", "chunk", "slice", "stack", "unbind", "matmul", "bmm", "einsum"}


def draw(channels: ChannelGraph) -> str:
    """An SVG document."""
    nodes = [node for node in channels.graph.graph.nodes if _shown(node)]
    shown = set(nodes)
    sources = {node: _sources(node, shown) for node in nodes}
    rows = _rows(nodes, sources)
    colours = _colours(channels)
    places: dict[fx.Node, tuple[float, float]] = {}
    for y, row in enumerate(rows):
        for x, node in enumerate(_ordered(row, sources, places)):
            offset = (x - (len(row) - 1) / 2) * (_WIDTH + _GAP_X)
            places[node] = (offset, y * (_HEIGHT + _GAP_Y))
    left = min((x for x, _ in places.values()), default=0) - _WIDTH / 2 - 20
    right = max((x for x, _ in places.values()), default=0) + _WIDTH / 2 + 20
    legend = _legend(channels, colours, right)
    height = max(len(rows) * (_HEIGHT + _GAP_Y), 20 * len(channels.groups)) + 60
    body = [_edge(places, source, node, _colour(channels, source, colours)) for node in nodes for source in sources[node]]
    body += [_box(channels, node, places[node], colours) for node in nodes]
    width = right - left + 420
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.0f} -40 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="11">\n'
        f'<rect x="{left:.0f}" y="-40" width="{width:.0f}" height="{height:.0f}" fill="white"/>\n'
        + "\n".join([*body, *legend])
        + "\n</svg>\n"
    )


def _shown(node: fx.Node) -> bool:
    """Layers, inputs, outputs, and functions that join or part channels."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_module":
        return "Dropout" not in str(node.meta.get("nn_module_stack", "")).rsplit(".", 1)[-1]
    if node.op != "call_function" or not shapes_of(node):
        return False
    name = str(getattr(node.target, "overloadpacket", node.target)).rsplit(".", 1)[-1]
    tensors = [source for source in node.all_input_nodes if shapes_of(source)]
    return name in _MANY or len(tensors) > 1


def _sources(node: fx.Node, shown: set[fx.Node]) -> list[fx.Node]:
    """The nearest shown nodes upstream."""
    found: dict[fx.Node, None] = {}
    waiting = list(node.all_input_nodes)
    seen = set()
    while waiting:
        source = waiting.pop()
        if source in seen or (source not in shown and not shapes_of(source)):  # a size is no channel
            continue
        seen.add(source)
        if source in shown:
            found[source] = None
        else:
            waiting += source.all_input_nodes
    return list(found)


def _rows(nodes: list[fx.Node], sources: Mapping[fx.Node, list[fx.Node]]) -> list[list[fx.Node]]:
    """Nodes by their longest way from an input."""
    depth: dict[fx.Node, int] = {}
    for node in nodes:
        depth[node] = max((depth[source] + 1 for source in sources[node]), default=0)
    rows: list[list[fx.Node]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for node, row in depth.items():
        rows[row].append(node)
    return rows


def _ordered(
    row: list[fx.Node], sources: Mapping[fx.Node, list[fx.Node]], places: Mapping[fx.Node, tuple[float, float]]
) -> list[fx.Node]:
    """Left to right as what they read from."""

    def centre(node: fx.Node) -> float:
        own = [places[source][0] for source in sources[node]]
        return sum(own) / len(own) if own else 0.0

    return sorted(row, key=centre)


def _colours(channels: ChannelGraph) -> dict[int, str]:
    """Group index -> colour; neighbours in the list differ most."""
    colours = {}
    for k, group in enumerate(channels.groups):
        red, green, blue = colorsys.hls_to_rgb(k * 0.61803 % 1, 0.72 if k % 2 else 0.62, 0.65)
        colours[k] = (
            _FROZEN if group.frozen is not None else f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
        )
    return colours


def _groups_of(channels: ChannelGraph, node: fx.Node) -> list[int]:
    values = channels.walk.values.get(node.name, ())
    owners = [channels.grouping.group_of[labels] for value in values for labels in value.axes.values()]
    return list(dict.fromkeys(int(k) for own in owners for k in own if k >= 0))


def _colour(channels: ChannelGraph, node: fx.Node, colours: Mapping[int, str]) -> str:
    groups = _groups_of(channels, node)
    return colours[groups[0]] if groups else _FROZEN


def _edge(places: Mapping[fx.Node, tuple[float, float]], source: fx.Node, node: fx.Node, colour: str) -> str:
    (x1, y1), (x2, y2) = places[source], places[node]
    top, bottom = y1 + _HEIGHT, y2
    middle = (top + bottom) / 2
    return (
        f'<path d="M{x1:.0f},{top:.0f} C{x1:.0f},{middle:.0f} {x2:.0f},{middle:.0f} {x2:.0f},{bottom:.0f}" '
        f'fill="none" stroke="{colour}" stroke-width="3"/>'
    )


def _box(channels: ChannelGraph, node: fx.Node, place: tuple[float, float], colours: Mapping[int, str]) -> str:
    x, y = place[0] - _WIDTH / 2, place[1]
    groups = _groups_of(channels, node)
    name = str(node.target) if node.op == "call_module" else node.name
    text = name if len(name) <= 30 else "…" + name[-29:]
    tips = [f"{name}: {' '.join(map(str, shapes_of(node)))}"]
    for k in groups:
        group = channels.groups[k]
        tips.append(f"{group.name}, {group.size}: {'free' if group.frozen is None else group.frozen}")
    share = _WIDTH / max(len(groups), 1)
    fills = [colours[k] for k in groups] or ["white"]
    stripes = [
        f'<rect x="{x + k * share:.1f}" y="{y:.0f}" width="{_WIDTH / len(fills):.1f}" height="{_HEIGHT}" fill="{fill}"/>'
        for k, fill in enumerate(fills)
    ]
    return (
        f"<g><title>{escape(chr(10).join(tips))}</title>{''.join(stripes)}"
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="3" fill="none" stroke="#59616b"/>'
        f'<text x="{place[0]:.0f}" y="{y + 17:.0f}" text-anchor="middle">{escape(text)}</text></g>'
    )


def _legend(channels: ChannelGraph, colours: Mapping[int, str], left: float) -> list[str]:
    lines = [f'<text x="{left + 20:.0f}" y="-20" font-weight="bold">{len(channels.groups)} channel groups</text>']
    for k, group in enumerate(channels.groups):
        y = 20 * k
        state = f"{group.size} channels" if group.frozen is None else f"{group.size} channels, frozen: {group.frozen}"
        tied = f" (+{len(group.layers) - 1} tied)" if len(group.layers) > 1 else ""
        lines.append(
            f'<rect x="{left + 20:.0f}" y="{y - 10}" width="14" height="14" fill="{colours[k]}" stroke="#59616b"/>'
            f'<text x="{left + 42:.0f}" y="{y + 1}">{escape(group.name + tied)}: {escape(state[:60])}</text>'
        )
    return lines
