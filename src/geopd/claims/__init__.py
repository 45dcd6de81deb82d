"""The paper's statements as functions over the tables of a results folder. Reads results only; never torch.

``decide_claims`` writes ``claims.json``, a contract for the report and other tools: a list with one entry per line of
the paper's reference table, each with the fields

- ``id``, ``title``, ``statement``: which line, and what the paper says;
- ``paper``: ``{"values": {"sft", "opd", "rlvr"}, "model", "source", "from_figures"}``, texts, for orientation;
- ``comparisons``: two entries, ``id`` = ``paper`` (SFT from its own origin, as in the paper) and ``same_origin`` (SFT
  continued from the origin of OPD and RLVR), each with
    - ``label``; ``runs`` ``{role: [run, ...]}``; ``left_out`` (runs of a needed paradigm that were not used);
    - ``quantity`` (what ``measured`` holds, with its setting) and ``measured`` ``{run: number or {name: number}}``;
    - ``null`` (name of the null model or null) and ``null_measured`` ``{run: number}``;
    - ``statements``: the claim taken apart, each ``{"text", "shows_here": yes | no | not measured, "estimate",
      "interval": [low, high] or null, "margin", "null_estimate", "null_shows": yes | no | no null, "verdict",
      "beyond_null", "explained_share", "reason"}``; an estimate above zero (or inside ``±margin``) is what the claim
      says; for an order it is the log ratio of the two sides;
    - ``shows_here``: ``yes`` | ``partly`` | ``no`` | ``not measured``: plain description of this folder;
    - ``null_shows``: ``yes`` | ``partly`` | ``no`` | ``no null``: whether the matched null, put through the same
      statements, shows them too;
    - ``verdict``: ``held`` | ``did not hold`` | ``unresolved`` | ``not measured``, over seeds (95% t intervals on
      per-seed values; two one-sided tests where a margin is given), never from a single seed;
    - ``beyond_null``: ``yes`` | ``no`` | ``unresolved`` | ``no null``: the same over seeds for value over null;
    - ``reason``: why it is not decided, or null; ``sentence``: the above in words;
- ``shows_here``, ``null_shows``, ``verdict``, ``reason``, ``sentence``: those of the comparison in which most of
  the three roles have a run (``paper`` where both have the same).
"""

from geopd.claims.catalogue import CLAIMS, decide, decide_claims

__all__ = ["CLAIMS", "decide", "decide_claims"]
