"""Program that draws Vega-Lite charts: reads a JSON list of specifications, and writes the list of their SVG texts.

It runs as a process of its own (`vidshard.jobs.report.charts`) and imports nothing of vidshard: V8, which draws, ends
its process where memory is short.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Draw the specifications of standard input."""
    import vl_convert

    specs = json.load(sys.stdin)
    json.dump([vl_convert.vegalite_to_svg(spec, allowed_base_urls=[]) for spec in specs], sys.stdout)


if __name__ == "__main__":
    main()
