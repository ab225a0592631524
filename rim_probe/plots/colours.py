"""The colours of panels and figures, light and dark: CSS variables for HTML, hex values for plotly.

Figures are made in light colours; where the page is dark, `plots.js` puts the dark ones in their place. Knows nothing
of figures; imports nothing.
"""

from __future__ import annotations

# (light, dark). Series: at least 25 CIE76 units apart as they are and with protan-, deuter- and tritanopia (Machado
# 2009), and 2.9:1 or more against the sheet; symbols and dashes say the same once more.
COLOURS = {
    "memory": ("#4338ca", "#a5b4fc"),
    "cot": ("#ad4c08", "#fbbf5a"),
    "ink": ("#1c1917", "#ece9e3"),
    "soft": ("#57534e", "#b3afa8"),
    "line": ("#d6d1c7", "#3b3a42"),
    "edge-line": ("#8a857c", "#77767f"),
    "paper": ("#faf9f6", "#15151a"),
    "sheet": ("#ffffff", "#1c1c22"),
    "right": ("#166534", "#7ddc9b"),
    "wrong": ("#b3261e", "#ff9d94"),
}
SERIES = (
    ("#4338ca", "#a5b4fc"),
    ("#c9862b", "#ffc65c"),
    ("#35a0dc", "#4ade9c"),
    ("#7a1712", "#b0567f"),
    ("#de3f7f", "#e8552f"),
    ("#590165", "#8a63e8"),
)
CONTROLS = (("#6f6a63", "#a39e97"), ("#98928a", "#7d7972"))
SEQUENTIAL = (
    ("#f1eff9", "#222230"),
    ("#c0baec", "#3d3a73"),
    ("#8f86dd", "#5f59b8"),
    ("#5448c0", "#9098ee"),
    ("#231a66", "#e2e7ff"),
)
DIVERGING = (
    ("#8a3f04", "#ffc98a"),
    ("#d79a5b", "#b5712f"),
    ("#f5f3ee", "#26252c"),
    ("#8f86dc", "#6a64c4"),
    ("#352a9c", "#c3ccff"),
)


def colour(tone: str) -> str:
    """The light colour of a name in `COLOURS`; anything else is a colour already."""
    return COLOURS[tone][0] if tone in COLOURS else tone


def faint(tone: str) -> str:
    """The same with the opacity of a band."""
    value = colour(tone)
    return f"rgba({int(value[1:3], 16)},{int(value[3:5], 16)},{int(value[5:7], 16)},0.16)"


def dark_colours() -> dict[str, str]:
    """Each light colour of a figure with its dark counterpart."""
    pairs = dict((*COLOURS.values(), *SERIES, *CONTROLS, *SEQUENTIAL, *DIVERGING))
    return pairs | {faint(light): faint(dark) for light, dark in pairs.items()}


def variables() -> str:
    """The colours as CSS variables, light and dark."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    return (
        f":root,.pic{{{light}}}.dark,.dark .pic,.pic.dark{{{dark}}}"
        f"@media (prefers-color-scheme:dark){{:root:has(.pic-page),.pic-page .pic{{{dark}color-scheme:dark}}}}"
    )
