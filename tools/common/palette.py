"""One color for each routing, in every picture and report."""

# Mostly of Okabe and Ito's palette, which is safe for color-blind readers; visible on white and on black.
ROUTING_COLORS: dict[str, str] = {
    "dense": "#777777",
    "topk": "#E69F00",
    "remoe": "#0072B2",
    "hash": "#009E73",
    "random": "#CC79A7",
    "expert_choice": "#8A5A44",
}
OTHER = "#B39B00"


def routing_color(name: str) -> str:
    """Return the color of a routing; "moe" is another name of "topk", and routings without a color share one."""
    return ROUTING_COLORS.get("topk" if name == "moe" else name, OTHER)
